"""Channel importance: how strongly the full model uses each hidden and each intermediate channel.

After Minitron (arXiv 2407.14679, section 2.2), as OverFill (arXiv 2508.08446, section 3) uses it. For a channel c,

    m(n, s, c)  = mean over the real tokens t of sample s of |a(n, t, c)|
    score(n, c) = sqrt(sum over s of m(n, s, c)^2)

with activations a at the places n: the outputs of `input_layernorm` and `post_attention_layernorm` (hidden channels),
and the inputs of `down_proj` (intermediate channels, per layer). The scores of hidden channels are summed over all
norms of all layers, because all layers share the residual stream. `across="mean"` takes the mean over s in place of the
L2 norm. Minitron found the mean over the sequence with the L2 norm over samples best (7.18 against 8.73 for L2 over
both, lower is better).

Running sums over s in float64 are all the memory, whatever the number of samples; sums merge across workers. Only
activations are read, never parameters, so the full model may be sharded (ZeRO-3). Keys and values are seen where they
enter the cache, after norms and rotary embedding; the cache handed to the model measures them and stores nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from overfill.errors import UserError
from overfill.shapes import PrunedWidths

Across = Literal["l2", "mean"]
FORMAT = "overfill-importance-1"
_DESCRIPTION = "description"
"""The only entry of the file's metadata."""
_SUMS = ("hidden_sum", "intermediate_sum", "kv_sum", "samples", "tokens")


@dataclass(frozen=True)
class KeptChannels:
    """The channels of the full model that the student keeps, ascending. Shapes: hidden [d], intermediate [L, i]."""

    hidden: Tensor
    intermediate: Tensor


@dataclass(frozen=True)
class ImportanceScores:
    """Scores of every channel, float64 on the CPU. Shapes: hidden [D], intermediate [L, I], kv_second_moment [L, 2].

    `kv_second_moment`: mean over real tokens of the squared norm, over all KV heads and dims, of a token's cached keys
    (column 0) and values (column 1). `samples` and `tokens` say over how many the means run.
    """

    hidden: Tensor
    intermediate: Tensor
    kv_second_moment: Tensor
    samples: int
    tokens: int
    across: Across = "l2"

    def keep(self, widths: PrunedWidths) -> KeptChannels:
        """The highest-scoring channels, in ascending order of index; of equal scores the lower index is kept.

        Raises ValueError for a width above the number of channels."""
        return KeptChannels(_top(self.hidden, widths.hidden), _top(self.intermediate, widths.intermediate))

    def save(self, path: Path) -> None:
        """Write one safetensors file, the same bytes for the same scores."""
        metadata = {"format": FORMAT, "samples": str(self.samples), "tokens": str(self.tokens), "across": self.across}
        tensors = {name: getattr(self, name).contiguous() for name in ("hidden", "intermediate", "kv_second_moment")}
        # One entry: safetensors writes several in an order of its own each time.
        save_file(tensors, path, metadata={_DESCRIPTION: json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> ImportanceScores:
        """Read what `save` wrote. Raises UserError for a missing, torn or foreign file."""
        tensors, metadata = _read(path)
        return cls(
            hidden=tensors["hidden"],
            intermediate=tensors["intermediate"],
            kv_second_moment=tensors["kv_second_moment"],
            samples=int(metadata["samples"]),
            tokens=int(metadata["tokens"]),
            across="l2" if metadata["across"] == "l2" else "mean",
        )


class ImportanceAccumulator:
    """Running sums of channel importance while a full model reads samples.

    A context manager: hooks are on the model inside it only. Every worker updates its own; `merge` adds another's.

        with ImportanceAccumulator(model) as importance:
            for tokens, mask in batches:
                importance.update(tokens, mask)
        scores = importance.scores()

    `model`: a causal language model of `overfill.architectures`, in evaluation mode. `forward` is what is called to run
    it, the model itself unless it is wrapped (a DeepSpeed engine). Sums live on the device of the activations.
    """

    def __init__(self, model: nn.Module, across: Across = "l2", forward: Callable[..., Any] | None = None) -> None:
        config: Any = model.config
        self.across: Across = across
        self._layers: list[Any] = list(model.get_submodule("model.layers"))
        self._forward = model if forward is None else forward
        self._model = model
        self._handles: list[Any] = []
        self._rows: list[Tensor] = []
        count = len(self._layers)
        self._sums: dict[str, Tensor] = {
            "hidden_sum": torch.zeros(2 * count, config.hidden_size, dtype=torch.float64),
            "intermediate_sum": torch.zeros(count, config.intermediate_size, dtype=torch.float64),
            "kv_sum": torch.zeros(count, 2, dtype=torch.float64),
            "samples": torch.zeros((), dtype=torch.int64),
            "tokens": torch.zeros((), dtype=torch.int64),
        }

    def __enter__(self) -> Self:
        for index, layer in enumerate(self._layers):
            places = (layer.input_layernorm, layer.post_attention_layernorm)
            for offset, norm in enumerate(places):
                self._handles.append(norm.register_forward_hook(self._output_hook("hidden_sum", 2 * index + offset)))
            self._handles.append(layer.mlp.down_proj.register_forward_pre_hook(self._input_hook(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def update(self, tokens: Tensor, mask: Tensor) -> None:
        """Let the full model read a batch and add it to the sums.

        tokens [B, T] int64; mask [B, T], true at real tokens, padded on either side. A row without real tokens is read
        (every worker must make the same calls under ZeRO-3) but not counted. Raises RuntimeError outside the context or
        for a model in training mode.
        """
        if not self._handles or self._model.training:
            raise RuntimeError("calibrate inside `with accumulator:` and with the model in evaluation mode")
        mask = mask.bool()
        self._rows = [row.nonzero().squeeze(1) for row in mask]
        self._forward(
            input_ids=tokens,
            attention_mask=mask.long(),
            position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
            past_key_values=_MeasuringCache(self._measure_cache),
            use_cache=True,
            logits_to_keep=1,
        )
        lengths = mask.sum(1)
        self._add("samples", (), (lengths > 0).sum())
        self._add("tokens", (), lengths.sum())

    def merge(self, other: ImportanceAccumulator | Mapping[str, Tensor]) -> None:
        """Add the sums of another worker (or its `state_dict`). Raises ValueError when they aggregate differently."""
        if isinstance(other, ImportanceAccumulator) and other.across != self.across:
            raise ValueError(f"sums for across={self.across!r} and across={other.across!r} do not merge")
        state = other.state_dict() if isinstance(other, ImportanceAccumulator) else other
        for name in _SUMS:
            self._add(name, (), state[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums themselves, not copies, so that an all-reduce in place merges workers.

        Shapes: hidden_sum [2L, D], intermediate_sum [L, I], kv_sum [L, 2] in float64; samples, tokens scalar int64."""
        return dict(self._sums)

    def scores(self) -> ImportanceScores:
        """The scores of what was read so far. Raises ValueError when nothing was."""
        sums = {name: value.cpu() for name, value in self._sums.items()}
        samples, tokens = int(sums["samples"]), int(sums["tokens"])
        if samples == 0:
            raise ValueError("no sample was read, so there are no scores")

        def across_samples(total: Tensor) -> Tensor:
            return total.sqrt() if self.across == "l2" else total / samples

        return ImportanceScores(
            hidden=across_samples(sums["hidden_sum"]).sum(0),
            intermediate=across_samples(sums["intermediate_sum"]),
            kv_second_moment=sums["kv_sum"] / tokens,
            samples=samples,
            tokens=tokens,
            across=self.across,
        )

    def _output_hook(self, name: str, index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, arguments, output: self._measure(name, index, output)

    def _input_hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, arguments: self._measure("intermediate_sum", index, arguments[0])

    def _measure(self, name: str, index: int, activations: Tensor) -> None:
        for row, positions in zip(activations, self._rows, strict=True):
            if len(positions):  # padding is left out by selection: what stands there may not even be finite
                mean = row[positions].abs().mean(0, dtype=torch.float64)
                self._add(name, (index,), mean.square() if self.across == "l2" else mean)

    def _measure_cache(self, layer: int, keys: Tensor, values: Tensor) -> None:
        for column, tensor in enumerate((keys, values)):
            for row, positions in zip(tensor, self._rows, strict=True):
                self._add("kv_sum", (layer, column), row[:, positions].double().square().sum())

    def _add(self, name: str, index: tuple[int, ...], value: Tensor) -> None:
        if self._sums[name].device != value.device:
            self._sums[name] = self._sums[name].to(value.device)
        self._sums[name][index] += value


class _MeasuringCache(DynamicCache):
    """A cache that shows keys and values [B, H, T, K] to a function, and keeps none."""

    def __init__(self, measure: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._measure = measure

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._measure(layer_idx, key_states, value_states)
        return key_states, value_states


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices [..., count] of the highest scores [..., C]; a stable sort makes ties deterministic, unlike `topk`."""
    if count > scores.shape[-1]:
        raise ValueError(f"cannot keep {count} of {scores.shape[-1]} channels")
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            if _DESCRIPTION in metadata:  # else it was written when each value had an entry of its own
                metadata = json.loads(metadata[_DESCRIPTION])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; run the importance stage first") from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: torn or not a safetensors file ({error}); run the importance stage again") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: format {metadata.get('format')!r}, wanted {FORMAT!r}; run the importance stage again")
    return tensors, metadata
