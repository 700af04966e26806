"""Which rows of a table of reports are asked for, what is asked, what is refused, and how answers are cleaned."""

import re

import pytest

from medvl.base import files
from medvl.ct import impressions, reports

HEADER = "VolumeName,Findings_EN,Impressions_EN\n"


def table(path, lines):
    path.write_text(HEADER + "".join(line + "\n" for line in lines))
    return impressions.read_table(str(path))


def training(folder, count=12):
    lines = [
        f"train_{i}_a_{k}.nii.gz,Findings of {i}.,Impression of {i}." for i in range(count) for k in (1, 2)
    ]
    return table(folder / "train_reports.csv", [*lines, "train_90_a_1.nii.gz,No words follow.,Not given."])


def test_rows_without_an_impression_are_those_that_reports_calls_absent(tmp_path):
    absent = ["", "NaN", "None", "not given", "Not given.", "N/A", " - "]
    lines = [f"p_{i}_a_1.nii.gz,Clear {i}.,{text}" for i, text in enumerate(absent)]
    rows = table(tmp_path / "r.csv", [*lines, "p_8_a_1.nii.gz,Clear.,Normal.", "p_9_a_1.nii.gz,None,nan"])
    prompts = impressions.make_prompts(rows, training(tmp_path), 8, 0)
    assert [bool(prompt) for prompt in prompts] == [True] * len(absent) + [False, False]
    kept = reports.read_reports(tmp_path / "r.csv", missing="empty")
    assert [not text for text in kept.values()] == [True] * len(absent) + [False, True]


def test_a_prompt_is_one_per_scan_and_made_of_complete_reports_of_distinct_scans(tmp_path):
    lines = ["p_1_a_1.nii.gz,Clear.,", "p_1_a_2.nii.gz,Clear.,", "p_2_a_1.nii.gz,Clear.,"]
    rows, examples = table(tmp_path / "r.csv", lines), training(tmp_path)
    first, second, other = impressions.make_prompts(rows, examples, 8, 0)
    assert first == second != other  # another scan, another draw
    assert first.startswith("You are an experienced radiologist. Based on the following examples, generate a")
    assert first.endswith("\n\nFindings: Clear.\nImpression:")
    shown = re.findall(
        r"Example (\d): *\nFindings: Findings of (\d+)\.\nImpression: Impression of \2\.\n\n", first
    )
    assert [int(number) for number, _ in shown] == [*range(1, 9)]
    assert len({scan for _, scan in shown}) == 8
    # The draw depends on the seed and the scan alone: not on the rest of the table, nor on the process.
    (alone,) = impressions.make_prompts(table(tmp_path / "a.csv", lines[2:]), examples, 8, 0)
    assert alone == other != impressions.make_prompts(rows, examples, 8, 1)[2]


def test_too_few_examples_are_refused_and_those_of_a_model_are_none(tmp_path):
    rows, examples = table(tmp_path / "r.csv", ["p_1_a_1,Clear.,"]), training(tmp_path)
    made = {volume: row | {"Impression_source": "generated"} for volume, row in examples.items()}
    with pytest.raises(ValueError, match="needs 8 scans with both texts as examples, got 0"):
        impressions.make_prompts(rows, made, 8, 0)
    with pytest.raises(ValueError, match="needs 8 scans with both texts as examples, got 5"):
        impressions.make_prompts(rows, training(tmp_path, 5), 8, 0)


def test_examples_of_the_tables_patients_are_refused(tmp_path):
    examples = training(tmp_path)
    rows = table(tmp_path / "r.csv", ["p_1_a_1,Clear.,", "train_3_b_1.nii.gz,Clear.,"])
    with pytest.raises(
        ValueError, match=r"row 9 of them and its row 3 are of the same one; give the training table"
    ) as e:
        impressions.check_tables(str(tmp_path / "r.csv"), rows, examples, True)
    assert "train_3" not in str(e.value)
    path = str(tmp_path / "train_reports.csv")
    with pytest.raises(ValueError, match="examples must be of other patients"):
        impressions.check_tables(path, examples, examples, True)


def test_a_table_whose_labels_are_evaluated_is_refused_unless_it_is_for_training(tmp_path):
    examples, path = training(tmp_path), str(tmp_path / "r.csv")
    for name in ("valid_1_a_1", "test_1_a_1"):
        rows = table(tmp_path / "r.csv", ["p_1_a_1,Clear.,", f"{name}.nii.gz,Clear.,"])
        with pytest.raises(ValueError, match=r"r.csv, row 3: no model may write .* add --for-training"):
            impressions.check_tables(path, rows, examples, False)
        impressions.check_tables(path, rows, examples, True)
    rows = table(tmp_path / "r.csv", ["validity_1_a_1,Clear.,", "p_1_a_1,Clear.,"])
    labels = "VolumeName,Nodule\np_1_a_1.nii.gz,1\n"
    (tmp_path / "train_predicted_labels.csv").write_text(labels)
    impressions.check_tables(path, rows, examples, False)
    (tmp_path / "dev_predicted_labels.csv").write_text(labels)
    with pytest.raises(ValueError, match=r"r.csv, row 3: no model may write"):
        impressions.check_tables(path, rows, examples, False)


@pytest.mark.parametrize(
    ("answer", "impression"),
    [
        ("No acute disease.", "No acute disease."),
        ("  No acute\n disease. ", "No acute disease."),
        ("Here's a concise impression:\n\nNo acute disease.", "No acute disease."),
        ("Based on the findings, here is the impression:\n**Impression:** Emphysema.", "Emphysema."),
        ("The findings are as follows:\n* Emphysema.", "Emphysema."),
        ("**Impression:**\n1. Emphysema\n2. 5 mm nodule.\n", "Emphysema. 5 mm nodule."),
        ("- Emphysema.\n- **Nodule** (5 mm)\n- Effusion", "Emphysema. Nodule (5 mm). Effusion"),
        ("Final impression: Cardiomegaly.", "Cardiomegaly."),
        ("Emphysema.\n\nExample 9:\nFindings: Clear.\nImpression: Normal.", "Emphysema."),
        ("<think>\nThe lungs: clear?\n</think>\n\n**Impression:** Emphysema.", "Emphysema."),
        ("The findings say\n1. Emphysema.\n</think>\nEmphysema.", "Emphysema."),
        ("There is a nodule: 1.5 cm.", "There is a nodule: 1.5 cm."),  # no preamble
        ("-5 HU in the cyst; lobes: clear.", "-5 HU in the cyst; lobes: clear."),
        ("None.", ""),
        ("Impression:", ""),
        (" \n", ""),
    ],
)
def test_an_answer_becomes_one_line_without_what_models_write_around_it(answer, impression):
    cleaned, was_cleaned = impressions.clean_answer(answer, False)
    assert cleaned == impression
    assert was_cleaned == (cleaned not in ("", " ".join(answer.split())) or answer == "Impression:")
    assert impressions.clean_answer(cleaned, False) == (cleaned, False)


@pytest.mark.parametrize(
    ("answer", "impression"),
    [
        ("Emphysema. A nodule of 1.5 cm. No eff", "Emphysema. A nodule of 1.5 cm."),
        ("Emphysema. A nodule of 1.", "Emphysema."),
        ("1. Emphysema\n2. Nodule\n3. Effu", "Emphysema. Nodule"),
        ("Emphysema and", ""),
        ("<think>The lungs. They are clear. I", ""),
    ],
)
def test_a_cut_answer_keeps_its_whole_sentences(answer, impression):
    assert impressions.clean_answer(answer, True)[0] == impression


def test_completed_rows_leave_originals_and_other_columns_as_they_are(tmp_path):
    (tmp_path / "r.csv").write_text(
        "Age,VolumeName,Findings_EN,Impressions_EN,Impression_source\n"
        '50,a_1_a_1.nii.gz,Clear.,"  Normal,\n as before ",\n'
        "51,b_1_a_1.nii.gz,Clear.,Not given.,\n"
        "52,c_1_a_1.nii.gz,,None,\n"
        "53,d_1_a_1.nii.gz,Clear.,Nodule.,generated\n"
    )
    rows = impressions.read_table(str(tmp_path / "r.csv"))
    before = files.read_csv(tmp_path / "r.csv")
    completed, log = impressions.complete_rows(rows, ["", "No disease.", "", ""])
    assert [row.pop("Impression_source") for row in completed] == ["original", "generated", "", "generated"]
    assert completed[1].pop("Impressions_EN") == "No disease."
    for row in before:
        del row["Impression_source"]
    del before[1]["Impressions_EN"]
    assert completed == before
    assert log == [
        {
            "row_index": 1,
            "volume_name": "b_1_a_1.nii.gz",
            "original_findings": "Clear.",
            "generated_impression": "No disease.",
            "original_impression": "Not given.",
        }
    ]
