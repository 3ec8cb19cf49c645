"""What a run is: the settings that decide it, as checkpoints and config.json store them.

Stored settings are completed by the defaults that stand here, in rope.py and in models.py: a setting that is added
with a default leaves old runs as they are.
"""

import inspect
import math
from dataclasses import asdict, dataclass, replace

from hub_model import check_settings
from models import SIZES, DiT, DiT_models
from rope import RopeConfig
from runtime.classes import imagenet

DEFAULT_OBJECTIVE = "eps"  # a key of diffusion.objectives.OBJECTIVES
DEFAULTS = {p.name: p.default for p in inspect.signature(DiT).parameters.values()}  # of the arguments of DiT


def name_of(hidden_size: int, depth: int, patch_size: int, **others) -> str:
    """The key of DiT_models that has these settings, and as others, num_heads and mlp_ratio, its own.

    Raises ValueError where there is none.
    """
    for name, size in SIZES.items():
        found = {**size, "mlp_ratio": DEFAULTS["mlp_ratio"]}
        asked = {"hidden_size": hidden_size, "depth": depth, **others}
        if f"DiT-{name}/{patch_size}" in DiT_models and asked == {key: found[key] for key in asked}:
            return f"DiT-{name}/{patch_size}"
    described = "".join(f", {name} {value}" for name, value in others.items())
    raise ValueError(
        f"hidden_size {hidden_size}, depth {depth}, patch_size {patch_size}{described} are those of none of "
        f"DiT-{{{'|'.join(SIZES)}}}/{{2|4|8}}"
    )


@dataclass(frozen=True)
class ModelConfig:
    """What rebuilds a DiT, stored in every checkpoint."""

    model: str = "DiT-XL/2"  # a key of DiT_models
    input_size: tuple[int, int] = (32, 32)  # latent height and width the model was built for
    in_channels: int = 4  # latent channels
    num_classes: int = 1000  # the null class comes after them
    class_dropout_prob: float = 0.1  # share of training labels replaced by the null class
    learn_sigma: bool = True  # predict the variance too
    rope: RopeConfig | None = None  # None = fixed sin-cos positions

    @property
    def patch_size(self) -> int:
        return int(self.model.split("/")[1])

    @property
    def size(self) -> str:
        """A key of SIZES."""
        return self.model.split("/")[0].removeprefix("DiT-")

    @property
    def hidden_size(self) -> int:
        return SIZES[self.size]["hidden_size"]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // SIZES[self.size]["num_heads"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches that positions refer to."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    def build(self) -> DiT:
        """The model, freshly initialised."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "model"}
        return DiT_models[self.model](**fields)

    def to_dict(self) -> dict:
        """As plain types."""
        return {**asdict(self), "input_size": list(self.input_size)}

    def arguments(self) -> dict:
        """What DiT takes to be this model, as plain types, such as stand in config.json on the Hugging Face hub."""
        values = {**self.to_dict(), **SIZES[self.size], "patch_size": self.patch_size}
        return {name: values.get(name, default) for name, default in DEFAULTS.items()}

    @classmethod
    def from_arguments(cls, values: dict) -> "ModelConfig":
        """Inverse of arguments, among which others may stand. Raises TypeError, or ValueError for no DiT_models."""
        values = {name: values.get(name, default) for name, default in DEFAULTS.items()}
        check_settings(values)
        given = {name: values.pop(name) for name in ("hidden_size", "depth", "num_heads", "mlp_ratio", "patch_size")}
        size = values["input_size"]
        size = [size, size] if isinstance(size, int) else size
        return cls.from_dict({"model": name_of(**given), **values, "input_size": size})

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Inverse of to_dict. Raises TypeError for keys that are not settings of the model."""
        config = cls(**values)
        rope = RopeConfig(**config.rope) if config.rope is not None else None
        return replace(config, input_size=tuple(config.input_size), rope=rope)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder of the latents."""

    source: str = "ema"  # where it was found: a name, a hub id or a folder; sha256 tells what it is
    sha256: str | None = None  # of its weights; None = unknown
    downsampling: int = 8  # pixels to a latent, along each axis
    latent_channels: int = 4
    scaling_factor: float = 0.18215  # latents are multiplied by it
    shift_factor: float = 0.0  # subtracted from latents before they are scaled

    @classmethod
    def from_dict(cls, values: dict) -> "VAEConfig":
        """Raises KeyError, TypeError or ValueError for what no autoencoder is."""
        config = cls(**{**values, "source": str(values.get("source", cls.source))})
        for name in ("downsampling", "latent_channels"):
            value = getattr(config, name)
            if type(value) is not int or not 1 <= value <= 1024:
                raise ValueError(f"vae.{name} is {value!r}")
        if not (0 < config.scaling_factor < math.inf and math.isfinite(config.shift_factor)):
            raise ValueError(f"vae.scaling_factor is {config.scaling_factor!r}, shift_factor {config.shift_factor!r}")
        return config

    def is_same(self, other: "VAEConfig") -> bool:
        """Whether both are the same autoencoder, wherever they were found."""
        return self.sha256 is not None and {**asdict(self), "source": ""} == {**asdict(other), "source": ""}


@dataclass(frozen=True)
class DataConfig:
    """The images that a run trains on."""

    fingerprint: str | None = None  # of the relative paths of all images, held-out ones included; None = unknown
    images: int | None = None  # trained on
    classes: list[str] | None = None  # names of the class folders by label; None = unknown

    @classmethod
    def from_dict(cls, values: dict, num_classes: int) -> "DataConfig":
        """Raises TypeError or ValueError for what no training data are of a model with so many classes."""
        config = cls(**values)
        classes = config.classes if config.classes is not None else []
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise ValueError(f"data.classes is a {type(classes).__name__} that is no list of names")
        if len(classes) > num_classes:
            raise ValueError(f"data.classes has {len(classes)} names for {num_classes} classes")
        return config


@dataclass(frozen=True)
class HeldOutConfig:
    """The images that a run validates on and never trains on."""

    fraction: float | None  # part of every class of the training data; None = a folder of their own
    fingerprint: str  # of their relative paths
    images: int
    left_out: list[str]  # hash_path of the unreadable images that the split was made without

    @classmethod
    def from_dict(cls, values: dict) -> "HeldOutConfig":
        """Raises KeyError, TypeError or ValueError for what train.py never wrote."""
        fraction = values["fraction"]
        if fraction is not None and not 0 < fraction < 1:
            raise ValueError(f"validation.fraction is {fraction!r}")
        left_out = [str(digest) for digest in values.get("left_out", [])]  # early runs did not list them
        return cls(fraction, str(values["fingerprint"]), int(values["images"]), left_out)


@dataclass(frozen=True)
class Recipe:
    """Options of train.py, by their names, that decide the weights. A resumed run has to repeat them."""

    global_batch_size: int = 256  # images a step, over all processes
    global_seed: int = 0
    flip: bool = True
    lr: float = 1e-4
    lr_schedule: str = "constant"  # or "linear": to 0 at the last step
    warmup_steps: int = 0  # of linear rise to lr
    weight_decay: float = 0.0
    grad_clip: float | None = None  # largest gradient norm; None = not limited
    ema_decay: float = 0.9999


@dataclass(frozen=True)
class RunConfig:
    """All of it. A checkpoint from elsewhere knows the model, and of the rest what its file and its name tell."""

    model: ModelConfig
    image_size: tuple[int, int]  # height and width in pixels
    vae: VAEConfig = VAEConfig()
    data: DataConfig = DataConfig()
    recipe: Recipe | None = None  # None = unknown
    validation: HeldOutConfig | None = None  # None = nothing held out
    objective: str = DEFAULT_OBJECTIVE

    def to_dict(self) -> dict:
        """As plain types; what is unknown or the only one there was in the beginning is left out."""
        values = {
            "model": self.model.to_dict(),
            "image_size": list(self.image_size),
            "vae": asdict(self.vae),
            "data": asdict(self.data),
        }
        if self.recipe is not None:
            values["recipe"] = asdict(self.recipe)
        if self.validation is not None:
            values["validation"] = asdict(self.validation)
        if self.objective != DEFAULT_OBJECTIVE:
            values["objective"] = self.objective
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "RunConfig":
        """Inverse of to_dict, for files of earlier versions too; keys that stand beside a run's config are left alone.

        Raises KeyError, TypeError or ValueError for values that train.py and export.py never wrote.
        """
        model, vae = ModelConfig.from_dict(values["model"]), VAEConfig.from_dict(values["vae"])
        lengths = [length * vae.downsampling for length in model.input_size]
        recipe, validation = values.get("recipe"), values.get("validation")
        return cls(
            model=model,
            image_size=(lengths[0], lengths[1]),
            vae=vae,
            data=DataConfig.from_dict(values["data"], model.num_classes),
            recipe=None if recipe is None else Recipe(**recipe),
            validation=None if validation is None else HeldOutConfig.from_dict(validation),
            objective=str(values.get("objective", DEFAULT_OBJECTIVE)),
        )


def from_elsewhere(model: ModelConfig, image_size: tuple[int, int], vae: str = "ema") -> RunConfig:
    """Of a checkpoint that tells no more than this: files from elsewhere with 1,000 classes are of ImageNet."""
    data = DataConfig(classes=list(imagenet()) if model.num_classes == 1000 else None)
    return RunConfig(model, image_size, VAEConfig(source=vae, latent_channels=model.in_channels), data)


def flatten(nested: dict, separator: str = ".") -> dict:
    """Nested values by their paths: {"recipe": {"lr": 0.0001}} becomes {"recipe.lr": 0.0001}."""
    flat = {}
    for key, value in nested.items():
        inner = flatten(value, separator) if isinstance(value, dict) else {}
        flat |= {f"{key}{separator}{path}": entry for path, entry in inner.items()} or {key: value}
    return flat
