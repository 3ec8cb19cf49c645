"""DiT on the Hugging Face hub: from_pretrained, save_pretrained, and what a config.json may say."""

from dataclasses import asdict

from huggingface_hub import PyTorchModelHubMixin

from rope import RopeConfig

# README.md of save_pretrained and push_to_hub; export.py writes one that knows the run.
CARD = """---
{{ card_data }}
---

A diffusion transformer ([DiT](https://arxiv.org/abs/2212.09748)), with its settings in config.json. With the code that
wrote it: `models.DiT.from_pretrained`, or `python sample.py --ckpt FOLDER` and `--ckpt hf://user/repo`.
"""

# Far beyond any DiT that was trained: a config.json that says more is damaged, and refused before memory is asked for.
LARGEST = dict(input_size=2**17, patch_size=64, in_channels=1024, hidden_size=2**15, depth=512, num_heads=1024)
LARGEST |= dict(num_classes=10**7)
# Without these, huggingface_hub 0.28 leaves RoPE out of config.json.
CODERS = {RopeConfig: (asdict, lambda values: RopeConfig(**values))}


class HubModel(PyTorchModelHubMixin, model_card_template=CARD, tags=["dit", "diffusion"]):
    """huggingface_hub's from_pretrained(folder or "user/repo"), save_pretrained and push_to_hub, but stricter."""

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(coders=CODERS, **arguments)  # which are not inherited

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **arguments):
        """As the mixin has it, but strict by default, and in evaluation mode with every version of huggingface_hub."""
        return super()._from_pretrained(strict=strict, **arguments).eval()

    @classmethod
    def _decode_arg(cls, expected_type, value):
        """As the mixin has it, but a setting of RoPE that this version does not know is an error, not dropped."""
        return RopeConfig(**value) if isinstance(value, dict) else super()._decode_arg(expected_type, value)


def check_settings(settings: dict) -> None:
    """Raise ValueError, with the setting's name, where DiT cannot be built with these arguments."""
    for name, largest in LARGEST.items():
        value = settings[name]
        for number in value if name == "input_size" and isinstance(value, list | tuple) else [value]:
            if type(number) is not int or not 1 <= number <= largest:
                raise ValueError(f"{name} is {value!r}; expected a whole number from 1 to {largest}")
    if isinstance(settings["input_size"], list | tuple) and len(settings["input_size"]) != 2:
        raise ValueError(f"input_size is {settings['input_size']!r}; expected one number, or height and width")
    if settings["hidden_size"] % settings["num_heads"]:
        raise ValueError(f"hidden_size {settings['hidden_size']} is not divisible by num_heads {settings['num_heads']}")
    for name, high in (("mlp_ratio", 64), ("class_dropout_prob", 1)):
        if type(settings[name]) not in (int, float) or not 0 <= settings[name] <= high:
            raise ValueError(f"{name} is {settings[name]!r}; expected a number from 0 to {high}")
    if type(settings["learn_sigma"]) is not bool:
        raise ValueError(f"learn_sigma is {settings['learn_sigma']!r}; expected true or false")
