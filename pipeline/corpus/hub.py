"""Hub datasets: which files, at which commit, make up a split.

`datasets` resolves a dataset's subset and split to its files at the given commit. Parquet files and JSON lines are then
read in place through `HfFileSystem`, like local ones: in pieces, in parallel, without a download of the whole. Anything
else (archives, CSV) is streamed by `datasets` itself, shard by shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from overfill.errors import UserError
from pipeline.corpus.files import LINE_SUFFIXES, PARQUET_SUFFIXES, pieces_of_files
from pipeline.corpus.pieces import HubPiece, Piece
from pipeline.corpus.rows import RowForm

if TYPE_CHECKING:
    from pipeline.config import DataConfig


def hub_pieces(config: DataConfig, split: str, form: RowForm) -> tuple[Piece, ...]:
    """The pieces of a split of a Hub dataset, at `config.revision`.

    Raises:
        UserError: the dataset, its subset, the split or the commit cannot be found or reached.
    """
    assert config.dataset is not None and config.revision is not None
    files = _split_files(config.dataset, config.subset, split, config.revision)
    direct = (*PARQUET_SUFFIXES, *(suffix for suffix in LINE_SUFFIXES if not suffix.endswith(".gz")))
    if files and all(file.endswith(direct) for file in files):
        return pieces_of_files(files, form)
    shards = _shards(config.dataset, config.subset, split, config.revision)
    return tuple(
        HubPiece(config.dataset, config.subset, split, config.revision, shard, shards) for shard in range(shards)
    )


def _split_files(dataset: str, subset: str | None, split: str, revision: str) -> list[str]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, subset, revision=revision)
    except Exception as error:  # the Hub client raises errors of its own, of requests and of the file system
        raise _unreachable(dataset, subset, revision, error) from error
    by_split = builder.config.data_files or {}
    if by_split and split not in by_split:
        raise UserError(f"data.split = {split}: {dataset} has no such split; it has {', '.join(map(str, by_split))}")
    return [str(file) for file in by_split.get(split, [])]


def _shards(dataset: str, subset: str | None, split: str, revision: str) -> int:
    import datasets

    try:
        stream = datasets.load_dataset(dataset, subset, split=split, revision=revision, streaming=True)
    except Exception as error:  # as above
        raise _unreachable(dataset, subset, revision, error) from error
    return max(1, stream.num_shards)


def _unreachable(dataset: str, subset: str | None, revision: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    return UserError(
        f"data.dataset = {dataset} (subset {subset}, revision {revision}): {type(error).__name__}: "
        f"{lines[0][:160] if lines else 'no reason given'}; check the three, or the connection to the Hub"
    )
