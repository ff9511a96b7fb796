"""Texts as vectors, the way that an encoder's authors use it: `TextEncoder`.

Queries and documents are encoded apart: with the prompts that a model has for each, a document with its title. The
model is loaded in the constructor; the caller chooses how many texts a call has.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np

from medmm_ray.config import ConfigError
from medmm_ray.engines.checkpoints import HUB_PREFIX, resolve
from medmm_ray.engines.encoder import Vectors, normalized
from medmm_ray.engines.encoder_identity import EncoderIdentity, source_of
from medmm_ray.engines.model_source import files_hash
from medmm_ray.engines.pretrained import check_weights, checkpoint_folder, open_clip_folder
from medmm_ray.engines.weights import ADAPTER_FILES, OPEN_CLIP_FILES, check_file, check_files, weight_files

Pooling = Literal["cls", "mean", "max", "lasttoken"]
TitleForm = Literal["line", "pair"]
Kind = Literal["query", "document"]


@dataclass(frozen=True)
class Usage:
    """How a text encoder is used; None: as its own files say, else as the line of the field does."""

    pooling: Pooling | None = None
    """What of the tokens' states becomes the vector. A checkpoint without modules.json does not say it."""
    title: TitleForm | None = None
    """How a document's title comes in: a line before the text (None too), or the first text of a pair."""
    normalize: bool | None = None
    """Whether vectors get unit length; None: unless the model compares by the dot product."""
    max_tokens: int | None = None
    """Most tokens that the model reads, special ones included; None: as many as it can."""

    def over(self, other: "Usage") -> "Usage":
        """This usage, with `other` where it says nothing."""
        stated = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **stated)


PUBLISHED: Mapping[str, Usage] = {
    # Jin et al. 2023 (arXiv 2307.00589): the state of [CLS], compared by the dot product.
    "ncbi/MedCPT-Query-Encoder": Usage(
        "cls",
        "line",
        normalize=False,
        max_tokens=64,
    ),
    "ncbi/MedCPT-Article-Encoder": Usage(
        "cls",
        "pair",
        normalize=False,
        max_tokens=512,
    ),
}
"""Plain checkpoints of which only the paper says how they are used, by their hub ids."""


class TextEncoder:
    """A sentence-transformers model, a checkpoint of transformers with a pooling, or the text half of an open_clip
    checkpoint; `path` as in `checkpoints.resolve`.

    A text longer than the model's context is cut at its end: `max_tokens` is what a text may have of them, without the
    special ones and the prompt for documents.
    """

    def __init__(
        self,
        path: str,
        device: str = "cpu",
        usage: Usage | None = None,
    ) -> None:
        usage = (usage or Usage()).over(PUBLISHED.get(path, Usage()))
        folder = resolve(path)
        is_clip = folder.startswith(HUB_PREFIX) or (Path(folder) / "open_clip_config.json").is_file()
        self._model = (
            _ClipTextHalf(folder, device)
            if is_clip
            else _SentenceTransformer(
                folder,
                device,
                usage,
            )
        )
        self._title = usage.title or "line"
        self._normalizes = self._model.is_cosine if usage.normalize is None else usage.normalize
        self.width = self._model.width
        self.max_tokens = self._model.max_tokens
        self._source = source_of(path)

    @cached_property
    def query_identity(self) -> EncoderIdentity:
        """What makes the vectors of queries."""
        return self._identity("query", "")

    @cached_property
    def document_identity(self) -> EncoderIdentity:
        """What makes the vectors of documents."""
        return self._identity("document", self._title)

    def _identity(self, kind: Kind, title: str) -> EncoderIdentity:
        return EncoderIdentity(
            source=self._source,
            weights=files_hash(self._model.files()),
            width=self.width,
            pooling=self._model.pooling,
            normalize=self._normalizes,
            title=title,
            prompt=self._model.prompt(kind),
            max_tokens=self.max_tokens,
        )

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        return self._model.count(list(texts)) if texts else []

    def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """Queries as vectors_ND, float32."""
        return self._vectors(list(texts), "query")

    def encode_documents(
        self,
        titles: Sequence[str],
        texts: Sequence[str],
    ) -> Vectors:
        """Documents as vectors_ND, float32; one without a title is its text alone."""
        # A pair without a title stays a pair: the model has learned that what it embeds is the second.
        inputs: list[str | tuple[str, str]] = []
        for title, text in zip(titles, texts, strict=True):
            if self._title == "pair":
                inputs.append((title, text))
            else:
                inputs.append(f"{title}\n{text}" if title else text)
        return self._vectors(inputs, "document")

    def _vectors(self, inputs: "Sequence[str | tuple[str, str]]", kind: Kind) -> Vectors:
        if not inputs:
            return np.zeros((0, self.width), np.float32)
        vectors_ND = self._model.encode(inputs, kind)
        return normalized(vectors_ND) if self._normalizes else vectors_ND.astype(np.float32)


# Weights that a sentence encoder does not use: BERT's pooler, the heads that fill in masked words, T5's decoder.
_UNUSED = ("pooler.", "cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "decoder.")


def _modules_file(name: str) -> Path | None:
    """The file that lists the modules of a sentence-transformers model; None for any other checkpoint."""
    from transformers.utils.hub import cached_file

    # A hub id is looked at like a folder: by what its repository has.
    file = cached_file(name, "modules.json", _raise_exceptions_for_missing_entries=False)
    return None if file is None else Path(file)


def _module_folders(folder: Path) -> list[Path]:
    """The folders of the modules of a sentence-transformers model, in order."""
    file = folder / "modules.json"
    check_file(file)
    return [folder / module["path"] for module in json.loads(file.read_text())]


class _SentenceTransformer:
    """A model of sentence-transformers, by the library itself; of a plain checkpoint with the pooling of its usage."""

    def __init__(
        self,
        folder: str,
        device: str,
        usage: Usage,
    ) -> None:
        from safetensors import SafetensorError

        try:
            self._model = self._load(folder, device, usage)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"text encoder {folder} cannot be read: {error}") from error
        if usage.max_tokens is not None:
            self._model.max_seq_length = min(usage.max_tokens, self._model.max_seq_length or usage.max_tokens)
        self._folder = folder
        # What is left for a text once the model's own marks and the prompt have their places.
        self._tokenizer: Any = self._model.tokenizer
        self.width = int(self._model.get_embedding_dimension())
        self.is_cosine = self._model.similarity_fn_name != "dot"
        special = self._tokenizer.num_special_tokens_to_add(pair=usage.title == "pair")
        self.max_tokens = int(self._model.max_seq_length) - special - self.count([self.prompt("document")])[0]

    @property
    def pooling(self) -> str:
        """What of the tokens' states becomes the vector; of a model without such a module nothing."""
        modes = [module.pooling_mode for module in self._model if type(module).__name__ == "Pooling"]
        return str(modes[0]) if modes else ""

    def prompt(self, kind: Kind) -> str:
        """What the library puts before a text of this kind."""
        prompt: str = self._model.prompts.get(kind) or ""
        return prompt

    def files(self) -> list[Path]:
        """The files that its weights were read from."""
        modules = _modules_file(self._folder)
        if modules is None:
            return weight_files(checkpoint_folder(self._folder))
        files: list[Path] = []
        for folder in _module_folders(modules.parent):
            files += weight_files(folder) + weight_files(folder, ADAPTER_FILES)
        return files

    @staticmethod
    def _load(
        folder: str,
        device: str,
        usage: Usage,
    ) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule
        from sentence_transformers.sentence_transformer.modules import Transformer

        # The library takes the mean of a checkpoint without this file, whatever the model was trained with.
        modules = _modules_file(folder)
        if modules is not None:
            for module_folder in _module_folders(modules.parent):
                check_files(module_folder)
            model = SentenceTransformer(folder, device=device)
            _check_transformer(model[0], _module_folders(modules.parent)[0])
            if usage.pooling is not None:
                _pooling_of(model).pooling_mode = usage.pooling
            return model
        if usage.pooling is None:
            raise ConfigError(
                f"text encoder {folder}: holds neither modules.json (sentence-transformers) nor open_clip_config.json, "
                "so how its vectors are pooled is not known; say it: embed.pooling=cls (as MedCPT) or mean"
            )
        # The library's own modules, put together as a modules.json would have it.
        transformer = Transformer(folder)
        _check_transformer(transformer, checkpoint_folder(folder))
        pooling = PoolingModule(transformer.get_embedding_dimension(), usage.pooling)
        return SentenceTransformer(modules=[transformer, pooling], device=device)

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        return list(
            map(
                len,
                self._tokenizer(
                    texts,
                    add_special_tokens=False,
                    verbose=False,
                )["input_ids"],
            )
        )

    def encode(
        self,
        inputs: "Sequence[str | tuple[str, str]]",
        kind: Kind,
    ) -> Vectors:
        """Inputs as vectors_ND, as the model gives them."""
        # Both are plain `encode` for a model that has no prompts.
        encode = self._model.encode_query if kind == "query" else self._model.encode_document
        vectors_ND: Vectors = encode(
            list(inputs),
            batch_size=len(inputs),
            show_progress_bar=False,
        )
        return vectors_ND


def _check_transformer(module: Any, folder: Path) -> None:
    """The library is strict with its own modules' weights, but not with those of transformers' model."""
    is_adapter = (folder / "adapter_config.json").is_file()  # peft checks its own
    if hasattr(module, "auto_model") and not is_adapter:
        model = module.auto_model
        check_weights(
            type(model),
            model.config,
            folder,
            missing=_UNUSED,
            unexpected=_UNUSED,
        )


def _pooling_of(model: Any) -> Any:
    for module in model:
        if type(module).__name__ == "Pooling":
            return module
    raise ConfigError("embed.pooling is set, but the text encoder has no pooling that could be another; leave it out")


class _ClipTextHalf:
    """The text half of an open_clip checkpoint."""

    is_cosine = True
    pooling = ""  # its own: a part of the model

    def __init__(
        self,
        folder: str,
        device: str,
    ) -> None:
        import open_clip
        from safetensors import SafetensorError

        on_hub = folder.startswith(HUB_PREFIX)
        name = folder if on_hub else f"local-dir:{folder}"
        try:
            if not on_hub:
                check_files(Path(folder), OPEN_CLIP_FILES)
            # Strict: it raises where weights are missing, or of no use to the model.
            self._model: Any = open_clip.create_model(
                name,
                device=device,
                require_pretrained=True,
            ).eval()
            self._tokenize: Any = open_clip.get_tokenizer(name)
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
            raise ConfigError(f"text encoder {folder} cannot be read: {error}") from error
        self._device, self._folder = device, folder
        self.width = int(open_clip.get_model_config(name)["embed_dim"])
        self.max_tokens = int(self._tokenize.context_length) - 2  # its marks of begin and end

    def prompt(self, kind: Kind) -> str:  # noqa: ARG002
        """It has none."""
        return ""

    def files(self) -> list[Path]:
        """The files that its weights were read from."""
        on_hub = self._folder.startswith(HUB_PREFIX)
        folder = open_clip_folder(self._folder.removeprefix(HUB_PREFIX)) if on_hub else self._folder
        return weight_files(Path(folder), OPEN_CLIP_FILES)

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, without special ones."""
        import open_clip

        if isinstance(self._tokenize, open_clip.tokenizer.HFTokenizer):
            encoded = self._tokenize.tokenizer(
                texts,
                add_special_tokens=False,
                verbose=False,
            )
            return list(map(len, encoded["input_ids"]))
        return [len(self._tokenize.encode(text)) for text in texts]

    def encode(
        self,
        inputs: "Sequence[str | tuple[str, str]]",
        kind: Kind,  # noqa: ARG002
    ) -> Vectors:
        """Inputs as vectors_ND, as the model gives them: queries and documents alike."""
        import torch

        # A CLIP's text half was trained on captions: it knows neither pairs nor prompts.
        texts = [text if isinstance(text, str) else "\n".join(text) for text in inputs]
        ids_NL = self._tokenize(texts).to(self._device)
        with torch.inference_mode():
            vectors_ND: Vectors = self._model.encode_text(ids_NL).float().cpu().numpy()
        return vectors_ND
