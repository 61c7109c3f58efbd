"""Models by the place in a store that they have, be it a folder or a URL: what `generate`, `bench` and MLflow are given."""

from __future__ import annotations

import re
from pathlib import Path

from overfill.errors import UserError
from pipeline.fingerprint import IDENTITY_LENGTH
from pipeline.objects.bucket import Bucket
from pipeline.objects.mirror import Damaged, Mirror

_PLACE = re.compile(
    rf"(?P<url>\w+://.+?)/(?P<key>[a-z][a-z0-9_]*/[^/]*[0-9a-f]{{{IDENTITY_LENGTH}}})(?:/payload(?:-\d+)?(?:/(?P<rest>.*))?)?"
)


def local_place(text: str) -> Path:
    """A path as it is; of the URL of an artifact, or of something in its payload, this node's verified copy.

    Raises UserError for a URL that names no finished artifact."""
    if "://" not in text:
        return Path(text).expanduser()
    match = _PLACE.fullmatch(text.rstrip("/"))
    if match is None:
        raise UserError(f"{text}: names no artifact; give URL/STAGE/LABEL_IDENTITY, as `overfill status` shows it")
    try:
        return Mirror(Bucket(match["url"])).fetch(match["key"]) / (match["rest"] or "")
    except Damaged as damage:
        raise UserError(f"{text}: this artifact was altered: {damage}; run its sweep again") from damage


def full_model_place(student: Path, full: str | None) -> str | None:
    """Where the full model of a student is, in a form that `TwoStageForCausalLM.from_pretrained` takes: as given, else
    as the student's manifest says. None leaves it to the manifest, which names a folder or a Hub id."""
    from overfill.checkpoint import read_manifest

    named = full if full is not None else read_manifest(student).full_model.id
    return str(local_place(named)) if "://" in named else full
