"""Configs of what is trained: the full model, where it is made here, and the student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from overfill.config import Frozen, LoraConfig, LossConfig, Method, default_loss

NOT_IDENTITY: dict[str, Any] = {"identity": False}
"""`json_schema_extra` of a field that never counts in a stage's identity."""

LARGEST = 10**15
"""Upper bound of what is counted: more than any run can have, and small enough for products of several as floats."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
DType = Literal["fp32", "bf16"]


class TrainingConfig(Frozen):
    """What every training run has: budget, batch, schedule, numerics."""

    tokens: Count = 1_000_000
    """Training budget in tokens of the corpus, prompts included; steps = tokens / batch_tokens, rounded up."""
    batch_tokens: Count = 2048
    """Tokens of one optimizer step over all workers, on average: the number of sequences per step is fixed."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2e-5
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warm-up."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    """Share of the steps over which the learning rate rises from 0."""
    final_learning_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at the end, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    """AdamW's decay of the second moment."""
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    dtype: DType = "fp32"
    """Weights and activations in training; under bf16 the optimizer keeps fp32 master weights."""
    evaluate_every: Annotated[int, Field(ge=0, le=LARGEST)] = 100
    """Optimizer steps between evaluations on held-out samples; 0 evaluates at the end only."""
    evaluate_samples: Count = 128
    """Held-out samples of an evaluation during training."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return -(-self.tokens // self.batch_tokens)


class TokenizerConfig(Frozen):
    """The tokenizer of a teacher that is trained here."""

    vocabulary: Annotated[int, Field(ge=300, le=LARGEST)] | None = None
    """Entries of a byte-level BPE trained on the corpus; empty takes the toy corpus' character tokenizer."""


class PretrainConfig(TrainingConfig):
    """A teacher trained from scratch on the corpus."""

    architecture: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """Model family."""
    hidden: Count = 128
    """Hidden channels."""
    intermediate: Count = 352
    """Intermediate channels."""
    layers: Count = 4
    """Decoder layers."""
    heads: Count = 4
    """Query heads."""
    kv_heads: Count = 4
    """Key and value heads."""
    head_dim: Count | None = None
    """Channels of a head; hidden / heads when empty."""
    tied: bool = True
    """Share the input and output embeddings."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """Its tokenizer."""
    prompt_loss: bool = False
    """Also learn to predict the prompt's tokens."""
    seed: Seed = 0
    """Seed of the weights and of the data order."""

    @model_validator(mode="after")
    def _heads_fit(self) -> PretrainConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"`heads` ({self.heads}) must be a multiple of `kv_heads` ({self.kv_heads})")
        if self.hidden % self.heads:
            raise ValueError(f"`hidden` ({self.hidden}) must be a multiple of `heads` ({self.heads})")
        if (self.head_dim or self.hidden // self.heads) % 2:
            raise ValueError("the head dimension must be even, for rotary position embeddings")
        return self

    def model_config_dict(self, vocabulary: int, max_positions: int) -> dict[str, Any]:
        """The `transformers` config.json fields of this model."""
        return {
            "model_type": self.architecture,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim or self.hidden // self.heads,
            "tie_word_embeddings": self.tied,
            "vocab_size": vocabulary,
            "max_position_embeddings": max_positions,
            # The customary 0.02 suits thousands of channels; a narrow model that starts there learns several times slower.
            "initializer_range": round(self.hidden**-0.5, 4),
        }


class TeacherConfig(Frozen):
    """The full model: one from the Hub or a folder (`model`), or one trained here (`pretrain`)."""

    name: Name | None = None
    """Short name in labels and tables; the last part of `model` when empty."""
    model: str | None = None
    """Hub id or local folder."""
    revision: str | None = None
    """Commit of the Hub repository; needed for a Hub id."""
    shape: Annotated[dict[str, Any] | None, Field(json_schema_extra=NOT_IDENTITY)] = None
    """Fields of its config.json, for `overfill plan` where the model is not on this machine."""
    pretrain: PretrainConfig | None = None
    """Train it on the corpus instead."""
    trust_remote_code: bool = False
    """Run code that the model's repository brings. Leave it off unless you have read that code."""

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.model is None) == (self.pretrain is None):
            raise ValueError("give either `model` (a Hub id or a folder) or `pretrain` (train one here)")
        return self

    @property
    def label(self) -> str:
        """Name for people."""
        if self.name or self.pretrain is None:
            return self.name or str(self.model).rstrip("/").split("/")[-1]
        return f"{self.pretrain.architecture}-h{self.pretrain.hidden}"


class ReleasedConfig(Frozen):
    """A model that somebody has published, to compare with: of the student's size, say. It has its own tokenizer and
    chat template, reads the same conversations, and is judged on the same answers as text."""

    name: Name | None = None
    """Short name in labels and tables; the last part of `model` when empty."""
    model: str
    """Hub id or local folder."""
    revision: str | None = None
    """Commit of the Hub repository; needed for a Hub id."""
    shape: Annotated[dict[str, Any] | None, Field(json_schema_extra=NOT_IDENTITY)] = None
    """Fields of its config.json, for `overfill plan` where the model is not on this machine."""

    @property
    def label(self) -> str:
        """Name for people."""
        return self.name or self.model.rstrip("/").split("/")[-1]


class DistillConfig(TrainingConfig):
    """How the student is trained."""

    method: Method = "overfill"
    """Which system the cell measures, and so what is trained."""
    loss: LossConfig | None = None
    """Weights of the loss; empty takes KL 1 + KV match 3 for `overfill` and `assisted`, KL 1 for the other methods."""
    lora: LoraConfig | None = None
    """Adapters of the method `lora`, and of no other; empty takes their defaults."""

    @property
    def effective_loss(self) -> LossConfig:
        """The loss that is used."""
        return self.loss or default_loss(self.method)

    @property
    def effective_learning_rate(self) -> float:
        """The peak learning rate that is used."""
        own = self.effective_lora.learning_rate if self.method == "lora" else None
        return self.learning_rate if own is None else own

    @property
    def effective_lora(self) -> LoraConfig:
        """The adapters that are used by the method `lora`."""
        return self.lora or LoraConfig()
