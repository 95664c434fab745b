"""What a fine-tuning run can be told, as dataclasses.

Imports nothing heavy: the help text of ``goat-kernels finetune`` must appear at once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

TASKS = ("digits", "image-classification", "text-classification", "causal-lm")

#: Learning rates where --learning-rate does not say; a method without an entry takes that of ``Method.rates_of``. Those
#: of the digits are for a tiny model trained for a minute; the others are the usual ones for pretrained transformers
#: (GOAT: the paper's).
LEARNING_RATES: dict[str, dict[str, float]] = {
    "digits": {"head": 2e-2, "full": 1e-3, "lora": 2e-3, "goat": 2e-3},
    "image-classification": {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4},
    "text-classification": {"head": 1e-3, "full": 2e-5, "lora": 2e-4, "goat": 1e-4},
    "causal-lm": {"full": 1e-5, "lora": 1e-4, "goat": 1e-4},
}

#: eta where --eta does not say: the paper's, 1 for ViT and RoBERTa, 0.1 for Llama at a learning rate of 1e-4.
ETA = {"digits": 1.0, "image-classification": 1.0, "text-classification": 1.0, "causal-lm": 0.1}

#: Epochs and batch size where --epochs, --max-steps and --batch-size do not say.
EPOCHS = {"digits": 18, "image-classification": 3, "text-classification": 3, "causal-lm": 1}
BATCH_SIZES = {"digits": 32, "image-classification": 16, "text-classification": 16, "causal-lm": 4}


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Hyper-parameters of the adapters.

    ``rank``, ``lora_alpha`` (None: 2 R), ``target_modules``, ``exclude_modules`` and ``dropout`` serve every adapter
    method; ``eta`` None is the task's (``ETA``); the rest is GOAT's alone. Names are a tuple, a regular expression is a
    string.
    """

    rank: int = 32
    experts: int = 8
    top_k: int = 2
    scaling: str | float = "goat"
    eta: float | None = None
    rho: float = 10.0
    init: str = "goat"
    residual: str = "path"
    balance_coefficient: float = 1e-3
    dropout: float = 0.0
    lora_alpha: float | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] | None = None
    backend: str = "auto"


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How each method is trained; ``learning_rates`` has one entry per method, ``threads`` None is torch's choice."""

    learning_rates: dict[str, float]
    epochs: float
    max_steps: int | None
    batch_size: int
    accumulation: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.0
    save_steps: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the model and the data come from, and how the data is read.

    ``text_column`` may name two columns, ``"A,B"``: a pair to classify, or a prompt and its response.
    ``skip_bad_files``: leave out images that cannot be read.
    """

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    eval_fraction: float = 0.2
    skip_bad_files: bool = False
    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    max_length: int = 256
    block_size: int = 256


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """One run of the command."""

    task: str
    methods: tuple[str, ...]
    output: str
    resume: bool
    overwrite: bool
    adapter: AdapterOptions
    training: TrainingOptions
    data: DataOptions = field(default_factory=DataOptions)

    def fingerprint(self) -> dict[str, object]:
        """Everything that determines the results, flat and JSON-ready, for comparing a resumed run with its start."""
        nested = asdict(self)
        flat = {"task": nested["task"], "methods": list(self.methods)}
        for group in ("adapter", "training", "data"):
            flat.update(nested[group])
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
