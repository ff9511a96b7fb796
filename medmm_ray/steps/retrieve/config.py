"""How evidence is looked up, and how much of it a question gets."""

from pydantic import Field

from medmm_ray.config import execution
from medmm_ray.engines.placement import GpuPlacement


class RetrieveConfig(GpuPlacement):
    """How evidence is looked up, and how much of it a question gets."""

    num_documents: int = Field(5, ge=0)
    """Passages per question, best first; 0 for none."""
    num_images: int = Field(3, ge=0)
    """Reference images per question (3 to 5 are the published numbers); 0 for none."""
    corpora: tuple[str, ...] | None = None
    """Corpora that passages come from, by their names; null: all."""
    published_until: str | None = Field(None, pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")
    """Date (2024, 2024-05, 2024-05-31) after which a document may not be published; those without a date may not come
    then either."""
    same_modality: bool = False
    """Whether images, and documents that have a modality, must be of the question's own."""
    candidates: int = Field(100, ge=1)
    """Passages that each ranker gives of each corpus, and that are reranked of each: Med-PRM's number."""
    dense_weight: float = Field(1.0, ge=0)
    """Weight of the dense ranker's ranks in the fusion; 0 leaves the ranker out."""
    lexical_weight: float = Field(1.0, ge=0)
    """Weight of BM25's ranks in the fusion; 0 leaves the ranker out."""
    fusion_k: float = Field(60.0, ge=0)
    """Reciprocal rank fusion gives weight / (fusion_k + rank) (Cormack et al. 2009: 60); a smaller one lets the first
    ranks count for more."""
    reranker: str | None = None
    """Cross-encoder that orders the candidates (folder, hub id as ncbi/MedCPT-Cross-Encoder, URI); null: none."""
    reranker_tokens: int | None = Field(None, ge=16)
    """Most tokens of a query and a passage together; null: as many as the reranker reads."""
    reranker_weight: float = Field(1.0, gt=0, le=1)
    """1: the reranker's order alone. Below, its ranks are fused with those of the rankers, which have the rest."""
    token_budget: int | None = Field(None, ge=1)
    """Tokens that a question's passages may have together; one that does not fit is passed over. null: no limit."""
    budget_model: str | None = None
    """Model whose tokens are counted for token_budget: the policy's or the reward model's folder or hub id."""
    duplicate_similarity: float = 0.9999
    """Cosine similarity from which a reference image counts as a duplicate of the question's own and is passed over."""
    batch_size: int = execution(256, ge=1)
    """Questions that one copy of the index looks up at a time."""
    reranker_batch_size: int = execution(32, ge=1)
    """Passages that the reranker reads at once."""
    num_actors: int = execution(1)
    """Most copies of the index that work at the same time."""
    num_cpus: float = execution(0.5)
    """Logical CPU cores one copy asks for."""
    num_gpus: float = execution(0.0)
    """GPUs that one copy holds: the reranker's; with FAISS for GPUs, flat and ivf_pq indexes are searched there too."""

    @property
    def searches_passage_vectors(self) -> bool:
        """Whether queries are compared with the passages' vectors: these must come of the index's own encoders."""
        return self.num_documents > 0 and self.dense_weight > 0
