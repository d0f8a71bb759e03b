"""Whether the corpus that a recipe names is there and fits; `mneme train` and `resume` ask first."""

import json
from pathlib import Path

from train.config import RunConfig

_COMMANDS = {
    "code": "quickstart",
    "docs": "quickstart",
    "pictures": "quickstart_mm",
    "niah": "niah",
}
"""What `mneme data build` calls the corpus whose folder is the key."""


def corpus_problems(config: RunConfig) -> list[str]:
    """What is missing on disk, or does not fit, for this recipe to be trained."""
    problems = []
    splits = ["train", "validation"] if config.evaluate.every_steps else ["train"]
    for name, source in config.data.sources.items():
        if _has_no_splits(source.path):
            continue
        missing = [split for split in splits if not (Path(source.path) / split).is_dir()]
        if missing:
            corpus, folder = Path(source.path).parent, Path(source.path).name
            what = _COMMANDS.get(folder, f"{corpus} --source {folder}, and your files (see --help)")
            problems.append(
                f"data.sources.{name}.path={source.path}: no {' or '.join(missing)} shards there; "
                f"make them with: mneme data build {what}"
            )
    tokenizer = Path(config.data.tokenizer)
    if not tokenizer.is_file():
        problems.append(
            f"data.tokenizer={tokenizer}: no such file; make it with: mneme data build quickstart"
        )
    elif (size := _tokenizer_size(tokenizer)) > config.model.vocab_size:
        problems.append(
            f"model.vocab_size={config.model.vocab_size}: smaller than the {size} tokens of "
            f"{tokenizer}; use model.vocab_size={size}"
        )
    return problems


def _has_no_splits(path: str) -> bool:
    """A folder of shards as others wrote them, a corpus of megatron-core, or a URL: ranks look there."""
    return "://" in path or Path(path, "manifest.json").is_file() or Path(f"{path}.idx").is_file()


def _tokenizer_size(path: Path) -> int:
    """One more than the highest token id of a `tokenizers` file; 0 if it is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ids = [token["id"] for token in content.get("added_tokens", [])]
        vocab = content["model"]["vocab"]
        ids += vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0
    return max(ids, default=-1) + 1
