"""The image tower: pictures as tokens (for the reward model's fusion) and as one vector (for retrieval).

Reads open_clip checkpoints (its own folder format or ``hf-hub:`` ids; native and timm vision transformers, so
BiomedCLIP too) and transformers' DINOv2 and ViT folders. Of a CLIP only the vision half is loaded; `save_pretrained`
copies the rest of the source checkpoint along, so that what it writes opens in open_clip as before.

Shapes: B images, H and W pixels, P patches, D the tower's width, E its embedding.
"""

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from medmm_ray.engines.dtype_device import device_of, dtype_of
from medmm_ray.engines.image_preprocess import Area, ClipPreprocess, Preprocess, ProcessorPreprocess, seen_area
from medmm_ray.engines.model_source import ModelSource, commit_of
from medmm_ray.engines.onednn_linear import use_onednn
from medmm_ray.engines.pretrained import checkpoint_folder, load, open_clip_folder
from medmm_ray.engines.weights import (
    OPEN_CLIP_FILES,
    TRANSFORMERS_FILES,
    WeightMismatch,
    WeightsError,
    check_files,
    weight_files,
)

CONFIG = "open_clip_config.json"
WEIGHTS = OPEN_CLIP_FILES[0]
_VISUAL = "visual."
# Weights of a transformers folder that a tower does not use: a plain ViT's pooler, which few checkpoints train, and the
# heads of models that were trained to classify, or to fill in masked patches.
_UNUSED_POOLER = ("pooler.",)
_UNUSED_HEADS = ("classifier.", "decoder.")


class ImageTokens(NamedTuple):
    """`pooled_BD`: the class token after the last block and its norm. `patches_BPD`: the penultimate block's, as is."""

    pooled_BD: Tensor
    patches_BPD: Tensor


class ImageTower(nn.Module):
    """A pretrained vision transformer: `width` D, `embed_dim` E, `image_size` a side in pixels, `path` where it lies,
    `origin` what it was called and which version it is."""

    def __init__(self, backbone: "_Backbone", path: str, origin: ModelSource) -> None:
        super().__init__()
        self.backbone = backbone
        self.path, self.origin = path, origin
        self.width = backbone.width
        self.embed_dim = backbone.embed_dim
        self.image_size = backbone.preprocess.image_size
        use_onednn(self)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        revision: str | None = None,
        *,
        dtype: "str | torch.dtype | None" = None,
        torch_dtype: "str | torch.dtype | None" = None,
        device: "str | int | torch.device | None" = None,
        device_map: "str | int | torch.device | None" = None,
    ) -> "ImageTower":
        """Load a tower, by default in float32 on the CPU, in evaluation mode, its parameters trainable.

        `name_or_path` as in `checkpoints.resolve`, `revision` a branch, tag or commit of a hub id; `dtype` and `device`
        (or `torch_dtype`, `device_map`) as in `RewardModel.from_pretrained`. Raises ValueError where it is no vision
        tower that can be read, where a file is not whole, and where the files do not hold exactly its weights.
        """
        number_format, target_device = dtype_of(dtype, torch_dtype), device_of(device, device_map)
        name = str(name_or_path)
        path, commit = _local_path(name, revision)
        is_folder = Path(path).is_dir()
        if revision is not None and commit is None and is_folder:
            raise ValueError(f"image tower {name}: revision is {revision!r}, but a folder has none; only a hub id has")
        if (Path(path) / CONFIG).is_file():
            backbone: _Backbone = _open_clip(Path(path))
        elif not is_folder or (Path(path) / "config.json").is_file():
            backbone = _Transformers(path, revision)
            commit = backbone.commit
        else:
            raise ValueError(f"image tower {path}: holds neither {CONFIG} (open_clip) nor config.json (transformers)")
        source = ModelSource(name, commit) if commit else ModelSource.of(path)
        tower = cls(backbone, path, source).eval()
        return tower.to(target_device, backbone.stored_dtype if number_format == "auto" else number_format)

    def files(self) -> list[Path]:
        """The files that its weights were read from."""
        folder = checkpoint_folder(self.path, self.origin.revision)
        return weight_files(folder, OPEN_CLIP_FILES if (folder / CONFIG).is_file() else TRANSFORMERS_FILES)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of its weights; pixels are taken in any."""
        return next(self.parameters()).dtype

    def preprocess(self, image: Image) -> Tensor:
        """An RGB picture as pixels_3HW, resized and normalised as the checkpoint says."""
        return self.backbone.preprocess(image)

    def area(self, width: int, height: int) -> Area:
        """The part of a picture of this size that it sees: its patches are laid over it."""
        return seen_area(self.backbone.preprocess.resize, width, height)

    def forward(self, pixels_B3HW: Tensor) -> ImageTokens:
        """The pooled token and the patch tokens of each picture."""
        pooled_BD, patches_BPD = self.backbone(pixels_B3HW.to(self.dtype))
        return ImageTokens(pooled_BD, patches_BPD)

    def embed(self, pixels_B3HW: Tensor) -> Tensor:
        """One vector_BE of unit length a picture: the CLIP embedding; the class token where there is no CLIP head."""
        pooled_BD, _ = self(pixels_B3HW)
        return normalize(self.backbone.project(pooled_BD), dim=-1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` (and open_clip or transformers themselves) can read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.backbone.save(Path(folder))


class _Backbone(nn.Module):
    """One library's vision transformer behind the four calls that a tower makes."""

    preprocess: Preprocess
    width: int
    embed_dim: int
    stored_dtype: torch.dtype  # of the weights in the checkpoint

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """pooled_BD, patches_BPD."""
        raise NotImplementedError

    def project(self, pooled_BD: Tensor) -> Tensor:
        """Embeddings_BE of pooled tokens, not yet of unit length."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write a folder that the library itself can read."""
        raise NotImplementedError


class _OpenClip(_Backbone):
    """The vision half of an open_clip folder; `visual` keeps its parameter names in the checkpoint."""

    def __init__(self, folder: Path, visual: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.visual = visual
        self.source = folder
        self.embed_dim = int(config["model_cfg"]["embed_dim"])
        self.preprocess = ClipPreprocess(config)

    def save(self, folder: Path) -> None:
        """Write the whole CLIP: the vision half as it is now, all else as in the source checkpoint."""
        weights = {name: weight for name, weight in _weights(self.source).items() if not name.startswith(_VISUAL)}
        for name, weight in self.visual.state_dict().items():
            weights[f"{_VISUAL}{name}"] = weight
        if folder.resolve() != self.source.resolve():
            for file in self.source.iterdir():
                if file.is_file() and file.name not in (*OPEN_CLIP_FILES, "manifest.json"):
                    shutil.copyfile(file, folder / file.name)
        _save_weights(weights, folder)


class _NativeClip(_OpenClip):
    """open_clip's own VisionTransformer."""

    def __init__(self, folder: Path, visual: Any, config: Mapping[str, Any]) -> None:
        super().__init__(folder, visual, config)
        if visual.attn_pool is not None or visual.pool_type == "none":
            raise ValueError(
                f"image tower {folder}: attentional pooling is not supported; use a CLIP with a class token"
            )
        self.width = int(visual.conv1.out_channels)
        self._penultimate = len(visual.transformer.resblocks) - 2

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """pooled_BD, patches_BPD."""
        visual: Any = self.visual
        # open_clip's public calls give the pooled token only after its projection, hence these steps of its forward.
        tokens_BLD = visual._embeds(pixels_B3HW)
        tokens_BLD, (inner_BLD,) = visual.transformer.forward_intermediates(tokens_BLD, indices=[self._penultimate])
        pooled_BD, _ = visual._pool(tokens_BLD)
        return pooled_BD, inner_BLD[:, 1:]

    def project(self, pooled_BD: Tensor) -> Tensor:
        """By the CLIP's own projection."""
        visual: Any = self.visual
        projected_BE: Tensor = pooled_BD @ visual.proj
        return projected_BE


class _TimmClip(_OpenClip):
    """A timm vision transformer inside open_clip (BiomedCLIP's form)."""

    def __init__(self, folder: Path, visual: Any, config: Mapping[str, Any]) -> None:
        from timm.models.vision_transformer import VisionTransformer

        super().__init__(folder, visual, config)
        if not isinstance(visual.trunk, VisionTransformer):
            raise ValueError(
                f"image tower {folder}: timm's {type(visual.trunk).__name__} is not supported; use a VisionTransformer"
            )
        self.width = int(visual.trunk.embed_dim)
        self._penultimate = len(visual.trunk.blocks) - 2

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """pooled_BD, patches_BPD."""
        trunk: Any = self.visual.trunk
        tokens_BLD, (patches_BPD,) = trunk.forward_intermediates(
            pixels_B3HW, indices=[self._penultimate], norm=False, output_fmt="NLC"
        )
        return trunk.forward_head(tokens_BLD, pre_logits=True), patches_BPD

    def project(self, pooled_BD: Tensor) -> Tensor:
        """By the CLIP's own projection."""
        visual: Any = self.visual
        projected_BE: Tensor = visual.head(pooled_BD)
        return projected_BE


class _Transformers(_Backbone):
    """A vision model of transformers whose sequence is class token, registers, patches."""

    def __init__(self, path: str, revision: str | None) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__()
        processors: Any = AutoImageProcessor
        self.commit = commit_of(path, "config.json", revision)
        stored: Any = load(
            AutoModel, path, missing=_UNUSED_POOLER, unexpected=_UNUSED_HEADS, revision=self.commit, dtype="auto"
        )
        self.stored_dtype = stored.dtype
        self.model: Any = stored.float()
        config = self.model.config
        self._processor: Any = processors.from_pretrained(path, revision=self.commit)
        num_register_tokens = config.to_dict().get("num_register_tokens", 0)
        num_registers = {"dinov2": 0, "vit": 0, "dinov2_with_registers": num_register_tokens}
        if config.model_type not in num_registers:
            raise ValueError(
                f"image tower {path}: model type {config.model_type!r} is not supported; expected "
                f"{sorted(num_registers)} or an open_clip checkpoint"
            )
        self._num_prefix = 1 + int(num_registers[config.model_type])  # the class token comes before them
        self.width = self.embed_dim = int(config.hidden_size)
        self.preprocess = ProcessorPreprocess(self._processor)

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """pooled_BD, patches_BPD."""
        output = self.model(pixel_values=pixels_B3HW, output_hidden_states=True)
        # Not `pooler_output`: a plain ViT's has a head that few checkpoints train.
        return output.last_hidden_state[:, 0], output.hidden_states[-2][:, self._num_prefix :]

    def project(self, pooled_BD: Tensor) -> Tensor:
        """The class token itself: there is no CLIP head."""
        return pooled_BD

    def save(self, folder: Path) -> None:
        """Write model and image processor."""
        self.model.save_pretrained(folder)
        self._processor.save_pretrained(folder)


def load_preprocess(name_or_path: str) -> Preprocess:
    """A tower's preprocessing without the tower; `name_or_path` as in `ImageTower.from_pretrained`."""
    path, _ = _local_path(name_or_path, None)
    if (Path(path) / CONFIG).is_file():
        return ClipPreprocess(json.loads((Path(path) / CONFIG).read_text()))
    from transformers import AutoImageProcessor

    processors: Any = AutoImageProcessor
    return ProcessorPreprocess(processors.from_pretrained(path))


def save_open_clip(
    folder: str | Path,
    model_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: Any = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
) -> None:
    """Write a CLIP in open_clip's own folder format (``local-dir:``).

    `model_config` is open_clip's ``model_cfg`` (embed_dim, vision_cfg, text_cfg), `weights` the model's state dict,
    `tokenizer` a Hugging Face tokenizer to lie beside it (then ``text_cfg.hf_tokenizer_name`` must not be empty).
    Pictures are squashed to a square: in a medical image a finding may lie at the border that a crop would lose.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    preprocess = {"mean": list(mean), "std": list(std), "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": dict(model_config), "preprocess_cfg": preprocess}
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    _save_weights(weights, folder)


def _open_clip(folder: Path) -> _OpenClip:
    """The vision half of an open_clip folder, with the weights of its file."""
    # The vision half alone: open_clip's factory would build the text half too, which for BiomedCLIP asks the hub for
    # another model's config even when the folder is local.
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    config = json.loads((folder / CONFIG).read_text())
    model_config = config["model_cfg"]
    vision = CLIPVisionCfg(**{**model_config["vision_cfg"], "timm_model_pretrained": False})
    if isinstance(vision.layers, (list, tuple)):
        raise ValueError(f"image tower {folder}: a ResNet has no patch tokens; use a vision transformer")
    if not isinstance(vision.image_size, int):
        raise ValueError(f"image tower {folder}: image_size {vision.image_size} is not square")
    visual = _build_vision_tower(model_config["embed_dim"], vision, model_config.get("quick_gelu", False))
    expected = {f"{_VISUAL}{name}": weight for name, weight in visual.state_dict().items()}
    # Anywhere in the name: a wrapper's mark in front of it is then named by the error.
    stored = {name: weight for name, weight in _weights(folder).items() if _VISUAL in name}
    WeightMismatch.between(expected, stored).check(f"image tower {folder}")
    visual.load_state_dict({name.removeprefix(_VISUAL): weight for name, weight in stored.items()})
    backbone = _TimmClip(folder, visual, config) if vision.timm_model_name else _NativeClip(folder, visual, config)
    backbone.stored_dtype = next(iter(stored.values())).dtype
    return backbone


def _weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an open_clip folder, both halves."""
    from safetensors.torch import load_file

    check_files(folder, OPEN_CLIP_FILES)
    files = weight_files(folder, OPEN_CLIP_FILES)
    if not files:
        raise ValueError(
            f"image tower {folder}: has {CONFIG} but none of the weight files {', '.join(OPEN_CLIP_FILES)}"
        )
    (file,) = files
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"image tower {folder}: {file.name} cannot be read: {error}") from error
    return weights


def _save_weights(weights: Mapping[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    # A copy of each tensor: safetensors refuses tensors that share memory.
    copies = {name: weight.detach().cpu().clone().contiguous() for name, weight in weights.items()}
    save_file(copies, folder / WEIGHTS)


def _local_path(name: str, revision: str | None) -> tuple[str, str | None]:
    """The folder of a tower, or the hub id of one of transformers'; and the commit of what open_clip's hub id gave."""
    if Path(name).is_dir():
        return name, None
    # Imported here: a tower in a folder, as in a reward model's, needs torch and its own library alone.
    from medmm_ray.engines.checkpoints import HUB_PREFIX, resolve

    path = resolve(name)
    if not path.startswith(HUB_PREFIX):
        return path, None
    snapshot = open_clip_folder(path.removeprefix(HUB_PREFIX), revision)
    return snapshot, Path(snapshot).name  # the hub's cache names a snapshot by its commit
