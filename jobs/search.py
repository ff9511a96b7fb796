"""Evidence for a question on the screen: passages with what each ranker says of them, and images similar to one.

    python -m jobs.search jobs/recipes/smollm2.yaml run=runs/mine "What blunts the costophrenic angle?" image=chest.png

It searches the run's index with the recipe's encoders and `retrieve` settings (retrieve.corpora=[textbooks], ...).
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from jobs.entry import launch
from jobs.recipe import Recipe
from jobs.step import Run, load_recipe
from medmm_ray.config import ConfigError
from medmm_ray.data.records import RetrievedDocument, RetrievedImage
from medmm_ray.engines.index.encoders import IndexEncoders
from medmm_ray.steps.embed import EmbedConfig, query_encoder
from medmm_ray.steps.retrieve import RetrieveConfig, load_search
from medmm_ray.steps.retrieve.images import OwnImages, ReferenceSearch

SHOWN = 220  # characters of a passage
ADVICE = "Search with the recipe and the models that the index was made with"


def main(words: Sequence[str] | None = None) -> int:
    """Run the job; `words` are its arguments, else the command line's. Gives the exit status."""
    arguments = argparse.ArgumentParser(
        "python -m jobs.search",
        description="Show the passages for a question, and the training images that are similar to a picture.",
        add_help=False,
    )
    arguments.add_argument(
        "recipe",
        nargs="?",
        help="the recipe of the run whose index is searched",
    )
    arguments.add_argument(
        "words",
        nargs="*",
        metavar="question | image=file | name=value",
        help="in any order",
    )
    arguments.add_argument(
        "--modality",
        default="",
        help="of the question, for retrieve.same_modality",
    )
    arguments.add_argument("--full", action="store_true", help="whole passages")
    arguments.add_argument(
        "-h",
        "--help",
        action="store_true",
        help="the settings that most runs change",
    )
    arguments.add_argument(
        "--help-all",
        action="store_true",
        help="every setting, its type and default",
    )
    return launch(arguments, words, _main, Recipe, "retrieve")


def _main(arguments: argparse.Namespace) -> int:
    image, question, overrides = "", "", []
    for word in arguments.words:
        name = word.partition("=")[0]
        if name == "image" and "=" in word:
            image = word.partition("=")[2]
        elif "=" in word and name.replace("_", "").replace(".", "").isidentifier():
            overrides.append(word)
        elif question:
            raise ConfigError(f"two questions: {question!r} and {word!r}; put the question in quotes")
        else:
            question = word
    if not (question or image):
        raise ConfigError('nothing to look for: name a recipe, and a "question" in quotes or image=<file>')
    run = Run(load_recipe([arguments.recipe, *overrides], "retrieve"))
    run.artifact("index").manifest()  # raises where it is not complete
    from medmm_ray.engines.checkpoints import local_folder

    folder, tower, config = local_folder(run.uri("index")), run.model("image_tower"), run.recipe.retrieve
    console = Console()
    if question:
        documents = find_passages(
            question,
            folder,
            config,
            run.recipe.embed,
            tower,
            arguments.modality,
        )
        console.print(passage_grid(documents, arguments.full))
    if image:
        console.print(
            image_grid(
                find_images(
                    image,
                    folder,
                    config,
                    run.recipe.embed,
                    tower,
                    arguments.modality,
                )
            )
        )
    return 0


def find_passages(
    question: str, folder: Path, config: RetrieveConfig, embed: EmbedConfig, tower: str, modality: str = ""
) -> list[RetrievedDocument]:
    """The passages for a question, best first."""
    encoder = query_encoder(embed, tower)
    IndexEncoders.load(folder).check("queries", encoder.query_identity, str(folder), ADVICE)
    vectors_QD = encoder.encode_queries([question])
    return load_search(config, folder).search(
        [question],
        vectors_QD,
        [modality],
    )[0]


def find_images(
    file: str, folder: Path, config: RetrieveConfig, embed: EmbedConfig, tower: str, modality: str = ""
) -> list[RetrievedImage]:
    """The training images most similar to a picture, without itself."""
    from medmm_ray.engines.encoder import ImageEncoder
    from medmm_ray.engines.image_tower import load_preprocess
    from medmm_ray.engines.images import open_image, read_bytes

    picture = load_preprocess(tower)(open_image(file, embed.max_pixels))
    encoder = ImageEncoder(tower)
    IndexEncoders.load(folder).check("images", encoder.identity, str(folder), ADVICE)
    vectors_ND = encoder.encode(np.asarray(picture, np.float32)[None])
    own = OwnImages(
        (),
        frozenset({hashlib.sha256(read_bytes(file)).hexdigest()}),
        vectors_ND,
    )
    return ReferenceSearch(config, folder).search({0: own}, [modality])[0]


def passage_grid(documents: Sequence[RetrievedDocument], is_full: bool) -> Grid:
    """Passages with what each ranker says of them."""
    grid = Grid(
        "", "passage", "dense", "BM25", "reranker", "score", title=f"{len(documents)} passages", show_lines=True
    )
    for rank, document in enumerate(documents, 1):
        text = document.text if is_full or len(document.text) <= SHOWN else f"{document.text[:SHOWN]} …"
        name = f"[bold]{escape(document.title)}[/bold]  [dim]{escape(document.corpus)}  {document.passage_id}[/dim]"
        scores = [_number(score) for score in (document.dense, document.lexical, document.reranker, document.score)]
        grid.add_row(str(rank), f"{name}\n{escape(text)}", *scores)
    return grid


def image_grid(images: Sequence[RetrievedImage]) -> Grid:
    """Images with their diagnoses and files."""
    grid = Grid(
        "",
        "image",
        "similarity",
        "diagnosis",
        "file",
        title=f"{len(images)} similar training images",
    )
    for rank, image in enumerate(images, 1):
        grid.add_row(
            str(rank),
            image.image_id,
            _number(image.similarity),
            escape(image.diagnosis),
            escape(image.uri),
        )
    return grid


def _number(score: float | None) -> str:
    return "–" if score is None else f"{score:.4f}"


if __name__ == "__main__":
    sys.exit(main())
