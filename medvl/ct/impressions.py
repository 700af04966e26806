"""Impressions that reports lack, by a language model from their findings: what is asked, what an answer becomes.

Source: the reference's few-shot generation, with complete reports of the training table in one user turn.
"""

import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from medvl.base import files
from medvl.ct import names, reports

Table = Mapping[str, dict[str, str]]  # {volume: its row}, in the order of the file
FINDINGS, IMPRESSION = "Findings_EN", "Impressions_EN"
SOURCE = "Impression_source"  # "original", "generated", or "" where there is none
_MARK = r"(?:[-*•]|\d{1,2}[.)])"  # of a list
# (what models write around an impression, what stands there instead), applied in this order.
_RULES = (
    (r"\A.*</think(?:ing)?>", ""),  # models that reason; the template may have begun it for them
    (r"\A\s*<think(?:ing)?>.*", ""),  # it was cut before its answer
    (r"\n\s*(?:Example \d+:|Findings:).*", ""),  # it goes on with examples of its own
    (r"\*\*|__", ""),
    (r"\A[^\n:]{0,100}\b(?:here(?:'s|’s| is| are)\b[^\n:]{0,100}|(?:as follows|following))\s*:\s*", ""),
    (r"\A\W*(?:(?:final|overall|concise) )?(?:impressions?|conclusion|summary|answer)\s*:\s*", ""),
    (rf"(?<=[\w)%])\s*\n\s*{_MARK}\s+", ". "),  # items become sentences
    (rf"(?:\A|\n)\s*{_MARK}(?:\s+|\Z)", "\n"),
)


def read_table(path: str) -> Table:
    """Read a CSV with VolumeName, Findings_EN and Impressions_EN."""
    rows = files.read_csv(path, ("VolumeName", FINDINGS, IMPRESSION))
    return dict(zip(reports.check_volumes(path, rows), rows, strict=True))


def check_tables(path: str, table: Table, examples: Table, for_training: bool) -> None:
    """Refuse examples of the table's patients and, unless `for_training`, a table whose labels are evaluated.

    It is evaluated if a volume is named valid_ or test_, or is in a *_predicted_labels.csv beside it but train's.
    """
    row_of = {names.patient_of(volume): row for row, volume in enumerate(examples, 2)}  # row 1 is the header
    labelled = set[str]()
    for labels in Path(path).parent.glob("*_predicted_labels.csv"):
        if not labels.name.startswith("train"):
            labelled |= {*reports.check_volumes(labels, files.read_csv(labels, ("VolumeName",)))}
    for row, volume in enumerate(table, 2):
        if other := row_of.get(names.patient_of(volume)):
            raise ValueError(
                f"impressions: examples must be of other patients than {path}, but row {other} of them and its row "
                f"{row} are of the same one; give the training table to --examples"
            )
        if not for_training and (volume.startswith(("valid_", "test_")) or volume in labelled):
            raise ValueError(
                f"{path}, row {row}: no model may write a report whose labels are evaluated (named valid_ or test_, "
                "or in a *_predicted_labels.csv beside it); if it is only trained on, add --for-training"
            )


def make_prompts(table: Table, examples: Table, shots: int, seed: int) -> list[str]:
    """What is asked for each row; "" where there is an impression, or no findings to make one from.

    Reconstructions of a scan have one prompt, and so one answer: its examples are drawn by the seed and its name.
    """
    real = {volume: row for volume, row in examples.items() if row.get(SOURCE) != "generated"}
    texts = {names.scan_of(v): (_text(row, FINDINGS), _text(row, IMPRESSION)) for v, row in real.items()}
    pool = [pair for pair in texts.values() if all(pair)]
    if len(pool) < shots:
        raise ValueError(f"impressions: needs {shots} scans with both texts as examples, got {len(pool)}")
    prompts = []
    for volume, row in table.items():
        findings = _text(row, FINDINGS)
        if _text(row, IMPRESSION) or not findings:
            prompts.append("")
            continue
        drawn = random.Random(f"{seed} {names.scan_of(volume)}").sample(pool, shots)
        prompts.append(_make_prompt(findings, drawn))
    return prompts


def _make_prompt(findings: str, examples: Iterable[tuple[str, str]]) -> str:
    """What is asked, after examples of (findings, impression)."""
    shown = ""
    for number, (known_findings, impression) in enumerate(examples, 1):
        shown += f"Example {number}:\nFindings: {known_findings}\nImpression: {impression}\n\n"
    return (
        "You are an experienced radiologist. Based on the following examples, generate a concise impression from "
        f"the given findings.\n\n{shown}Now, act as a radiologist, and generate the impression of these findings in "
        f"the manner of the examples.\n\nFindings: {findings}\nImpression:"
    )


def _text(row: Mapping[str, str], column: str) -> str:
    return "" if reports.is_absent(row[column]) else " ".join(row[column].split())


def clean_answer(text: str, is_cut: bool) -> tuple[str, bool]:
    """(impression, was more than white space cleaned) of a model's answer; of one that is cut the whole sentences."""
    if is_cut:
        # The point of "1." ends no sentence, and may be half of "1.5".
        text = text[: max((end.end() for end in re.finditer(r"(?<!\d)[.!?](?=\s|\Z)|\n", text)), default=0)]
    cleaned = text.strip()
    for pattern, instead in _RULES:
        cleaned = re.sub(pattern, instead, cleaned, flags=re.IGNORECASE | re.DOTALL).strip()
    cleaned = " ".join(cleaned.split())
    return "" if reports.is_absent(cleaned) else cleaned, cleaned != " ".join(text.split())


def complete_rows(table: Table, written: list[str]) -> tuple[list[dict[str, str]], list[dict[str, object]]]:
    """(rows with impressions and `SOURCE`, log of those that were written) of a table and what was written."""
    rows, log = [], list[dict[str, object]]()
    for i, (row, text) in enumerate(zip(table.values(), written, strict=True)):
        # A table that was completed before says the source already.
        source = (row.get(SOURCE) or "original") if _text(row, IMPRESSION) else ""
        rows.append(row | ({IMPRESSION: text, SOURCE: "generated"} if text else {SOURCE: source}))
        if text:
            line = {"row_index": i, "volume_name": row["VolumeName"], "original_findings": row[FINDINGS]}
            log.append(line | {"generated_impression": text, "original_impression": row[IMPRESSION]})
    return rows, log
