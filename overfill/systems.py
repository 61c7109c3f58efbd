"""The systems of `overfill.workload` as functions from a prompt to tokens, over one or two loaded models.

Our own systems share what was compiled: `overfill`, `overfill-refresh` and `exact` are one engine asked differently,
and a model is read by one `Reader` in all engines. Every system decodes greedily and never ends early: the models'
generation configs are replaced by empty ones, because `generate(eos_token_id=None)` does not reach the assistant, which
fills in its own config's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from overfill import workload
from overfill.engine import Engine
from overfill.fast_linear import weight_bytes
from overfill.generation import generate
from overfill.reader import Reader
from overfill.shapes import ModelShape
from overfill.workload import Point, Refresh

Generate = Callable[[Tensor, int, BaseStreamer | None], Any]
"""Prompts int64 [B, P] on the device, new tokens per row, where to put them -> what `generate` returned."""


PARTS = {
    workload.FULL: ("full", "full"),
    workload.STUDENT: ("student", "student"),
    workload.OVERFILL: ("full", "student"),
    workload.REFRESH: ("full", "student"),
    workload.EXACT: ("full", "student"),
    workload.PLAIN_FULL: ("full", "full"),
    workload.PLAIN_STUDENT: ("student", "student"),
    workload.ASSISTED: ("full", "student"),
}
"""System -> the model that reads the prompt, and the one that writes, or drafts what the first verifies."""


@dataclass(frozen=True)
class System:
    """One way to generate."""

    name: str
    generate: Generate
    models: tuple[PreTrainedModel, ...]
    """What it holds, each once."""
    step_bytes: Callable[[Point], int | None]
    """Bytes that a decode step must read at a point."""
    unfit: Callable[[Point], str | None]
    """Why it cannot be measured at a point, or None."""
    engine: Engine | None = None
    """What it runs in; None: `transformers`."""

    @property
    def device(self) -> torch.device:
        """Where it decodes."""
        return self.models[-1].device

    @property
    def decoder(self) -> str:
        """How tokens are decoded: `eager` or `compiled`."""
        return "eager" if self.engine is None else self.engine.decoder

    @property
    def compile_seconds(self) -> float:
        """Time that its engine, which other systems may share, has spent compiling so far."""
        return 0.0 if self.engine is None else self.engine.compile_seconds

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and response."""
        return min(model.config.max_position_embeddings for model in self.models)


def make_systems(
    full: PreTrainedModel,
    student: PreTrainedModel | None,
    names: Sequence[str],
    decoder: str = "eager",
    refresh: Refresh = None,
    draft: int | None = None,
    weights: str = "stored",
) -> list[System]:
    """The named systems, in the order given; changes the models' generation configs.

    Args:
        student: None where only systems in `workload.ALONE` are asked for.
        decoder: of our own systems: `eager`, `compiled` or `auto`.
        refresh: of `overfill-refresh`.
        weights: of the student in our own systems: `stored` or `int8`.
        draft: tokens drafted at once by `exact` and `transformers-assisted`; None: as many as each finds best.

    Raises UserError where two models cannot share a cache, or the decoder cannot be had here.
    """
    models = {"full": full} if student is None else {"full": full, "student": student}
    for model in models.values():
        model.generation_config = GenerationConfig()
    if student is not None and draft is not None:
        student.generation_config.num_assistant_tokens = draft
        student.generation_config.assistant_confidence_threshold = 0.0  # or drafts would end where the student doubts
    shapes = {name: ModelShape.from_config(model.config.to_dict()) for name, model in models.items()}
    engines: dict[tuple[str, str], Engine] = {}
    readers: dict[int, Reader] = {}

    def system(name: str) -> System:
        first, second = PARTS[name]
        engine = None
        if name.startswith("transformers-"):
            run = _library(models[first], models[second] if name == workload.ASSISTED else None)
        else:
            if (first, second) not in engines:
                kept = "stored" if second == "full" else weights
                engines[first, second] = Engine(models[first], models[second], decoder, kept, readers)
            engine = engines[first, second]
            dial = refresh if name == workload.REFRESH else None
            run = _exact(engine, draft) if name == workload.EXACT else _two_stage(engine, dial)
        return System(
            name=name,
            generate=run,
            models=tuple(models[part] for part in dict.fromkeys((first, second))),
            step_bytes=lambda point: _less(
                workload.step_bytes(name, shapes["full"], shapes.get("student"), point, refresh),
                engine,
                workload.students_share(name, point, refresh),
            ),
            unfit=lambda point: workload.unfit(name, point, refresh),
            engine=engine,
        )

    return [system(name) for name in names]


class FirstTokenWatch(StoppingCriteria):
    """Puts the prompts and the first tokens to a streamer when they are there. Stops nothing.

    For systems whose rows grow at paces of their own, so that their tokens cannot be streamed together."""

    def __init__(self, streamer: BaseStreamer, prompt: int) -> None:
        self.streamer = streamer
        self.prompt = prompt
        self._done = False

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        """Look at the text so far, int64 [B, columns]; bool [B], all false."""
        if not self._done:
            self.streamer.put(input_ids[:, : self.prompt].cpu())
            self.streamer.put(input_ids[:, self.prompt].cpu())
            self._done = True
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _less(stored: int | None, engine: Engine | None, share: float) -> int | None:
    """Bytes of a step with the student's weights as its reader holds them, from those as they are stored; `share` of
    the steps are the student's."""
    if stored is None or engine is None:
        return stored
    return stored - round(share * (weight_bytes(engine.decode_model) - weight_bytes(engine.student.model)))


def _two_stage(engine: Engine, refresh: Refresh) -> Generate:
    def run(ids: Tensor, output: int, streamer: BaseStreamer | None) -> Any:
        return generate(engine, ids, **_common(ids, output), streamer=streamer, refresh=refresh)

    return run


def _exact(engine: Engine, draft: int | None) -> Generate:
    def run(ids: Tensor, output: int, streamer: BaseStreamer | None) -> Any:
        options = {**_common(ids, output), "exact": True, "draft_tokens": draft, "return_dict_in_generate": True}
        if streamer is None or len(ids) == 1:
            return generate(engine, ids, **options, streamer=streamer)
        watch = FirstTokenWatch(streamer, ids.shape[1])
        result: Any = generate(engine, ids, **options, stopping_criteria=StoppingCriteriaList([watch]))
        streamer.put(result.sequences[:, ids.shape[1] + 1 :].cpu())
        return result

    return run


def _library(model: PreTrainedModel, assistant: PreTrainedModel | None) -> Generate:
    options = {} if assistant is None else {"assistant_model": assistant}
    library: Any = model  # `generate` comes with a mixin that the class of all models does not name

    def run(ids: Tensor, output: int, streamer: BaseStreamer | None) -> Any:
        return library.generate(ids, **_common(ids, output), streamer=streamer, use_cache=True, **options)

    return run


def _common(ids: Tensor, output: int) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(ids), "max_new_tokens": output, "do_sample": False}
