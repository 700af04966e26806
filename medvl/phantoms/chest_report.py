"""Radiology reports of chest cases: sentences on present and some absent findings, and an impression."""

from medvl.phantoms.chest_case import FINDINGS, ChestCase, Gen, Lesions

# Sentences for a present finding. {side}: right, left, bilateral; {zone}: upper, middle, lower; {size}: mm;
# {term}: the finding; {amount}: small, moderate, large.
_POSITIVE = {
    "Arterial wall calcification": (
        "There is {term}.",
        "{term} is seen in the thoracic aorta.",
        "{term} is observed in the aortic arch and descending aorta.",
        "Calcified atheroma plaques are seen in the wall of the thoracic aorta, consistent with {term}.",
        "The thoracic aorta shows {term}.",
    ),
    "Cardiomegaly": (
        "There is {term}.",
        "{term} is present, the cardiothoracic ratio is increased.",
        "Heart size is increased, consistent with {term}.",
        "{term} is observed.",
        "The heart is enlarged: {term}.",
    ),
    "Pericardial effusion": (
        "There is {term}.",
        "{term} measuring {size} mm in thickness is seen.",
        "{amount} {term} is present around the heart.",
        "{term} reaching {size} mm at its thickest point is observed.",
    ),
    "Coronary artery wall calcification": (
        "There is {term}.",
        "{term} is seen.",
        "Calcified plaques are observed in the coronary arteries, {term}.",
        "{term} is present in the left anterior descending artery.",
        "The coronary arteries show {term}.",
    ),
    "Hiatal hernia": (
        "There is {term}.",
        "{term} is observed at the lower end of the esophagus.",
        "A {size} mm {term} is seen behind the heart.",
        "{term} is present.",
    ),
    "Emphysema": (
        "There is {term}.",
        "{term} is present in both lungs.",
        "{term} is seen, most in the {zone} zones of both lungs.",
        "Areas of low attenuation in both lungs, {term}.",
        "Both lungs show {term}.",
    ),
    "Atelectasis": (
        "There is {term}.",
        "Linear {term} is seen in the {side} lung base.",
        "Band {term} is observed in the lower zone of the {side} lung.",
        "{term} is present in the {side} lower lobe.",
    ),
    "Lung nodule": (
        "There is {term}.",
        "A {size} mm {term} is seen in the {zone} zone of the {side} lung.",
        "A {term} measuring {size} mm is observed in the {side} lung.",
        "{term} is present, the largest {size} mm in the {side} {zone} zone.",
        "In the {side} {zone} lung zone a {term} of {size} mm is detected.",
    ),
    "Lung opacity": (
        "There is {term}.",
        "{term} is seen in the {zone} zone of the {side} lung.",
        "Patchy {term} is observed in the {side} lung.",
        "{term} is present in the {side} {zone} zone.",
    ),
    "Pleural effusion": (
        "There is {term}.",
        "{amount} {side} {term} is seen.",
        "{side} {term} reaching {size} mm in depth is observed.",
        "{term} is present on the {side} side.",
        "{amount} {term} on the {side}.",
    ),
    "Consolidation": (
        "There is {term}.",
        "{term} is seen in the {zone} zone of the {side} lung.",
        "An area of {term} with air bronchograms is observed in the {side} lung.",
        "{term} measuring {size} mm is present in the {side} {zone} zone.",
    ),
}
# Synonyms of each finding; the first is the usual one.
_TERMS = {
    "Arterial wall calcification": ("arterial wall calcification", "aortic wall calcification"),
    "Cardiomegaly": ("cardiomegaly", "cardiac enlargement"),
    "Pericardial effusion": ("pericardial effusion", "pericardial fluid"),
    "Coronary artery wall calcification": (
        "coronary artery wall calcification",
        "coronary artery calcification",
    ),
    "Hiatal hernia": ("hiatal hernia", "sliding hiatal hernia"),
    "Emphysema": ("emphysema", "emphysematous change"),
    "Atelectasis": ("atelectasis", "atelectatic change"),
    "Lung nodule": ("lung nodule", "pulmonary nodule"),
    "Lung opacity": ("lung opacity", "ground-glass lung opacity"),
    "Pleural effusion": ("pleural effusion", "pleural fluid"),
    "Consolidation": ("consolidation", "airspace consolidation"),
}
# Sentences for an absent finding.
_NEGATIVE = (
    "No {term}.",
    "No {term} is seen.",
    "There is no {term}.",
    "{term} is not present.",
    "{term} was not observed.",
    "{term} is not detected.",
    "No evidence of {term}.",
    "The examination is without evidence of {term}.",
)
# Sentences about what is no finding here.
_OTHER = (
    "The thyroid gland is unremarkable.",
    "Trachea and main bronchi are patent.",
    "No lymph node of pathological size is seen in the axillae.",
    "Mediastinal structures are in the midline.",
    "Degenerative changes are present in the thoracic spine.",
    "Bone structures are natural.",
    "The upper abdominal organs within the sections are normal.",
    "The adrenal glands are of normal size.",
    "Vertebral heights are preserved.",
    "Evaluation is limited by breathing motion.",
    "The esophagus is of normal caliber.",
)
# Impressions of a case without findings.
_NORMAL = (
    "No acute abnormality.",
    "Examination within normal limits.",
    "No acute cardiopulmonary abnormality is seen.",
    "Findings within normal limits.",
    "Thorax CT without significant findings.",
)
_INDICATIONS = (
    "Cough.",
    "Shortness of breath.",
    "Chest pain.",
    "Check-up.",
    "Fever.",
    "Not given.",
    "Follow-up.",
    "Preoperative evaluation.",
)
_TECHNIQUES = (
    "Axial sections were obtained with multidetector CT.",
    "Non-gated chest CT, axial reconstruction.",
    "1.5 mm thick sections were taken in the axial plane.",
)


def write_chest_report(case: ChestCase, gen: Gen) -> dict[str, str]:
    """The report of a case, by CT-RATE's column names.

    Every present finding has a sentence; each absent one is negated or left out at random. Sentences come in
    random order, mixed with others that say nothing of the findings. The impression holds the present
    findings alone.
    """
    # A number is drawn for absent findings only.
    negated = [name for name in FINDINGS if name not in case.findings and gen.random() < 0.5]
    sentences = [_affirm(name, lesions, gen) for name, lesions in case.findings.items()]
    sentences += [_negate(name, gen) for name in negated]
    sentences += [_OTHER[i] for i in gen.choice(len(_OTHER), gen.integers(1, 5), replace=False)]
    # Drawn anew, so that the impression does not repeat the words of the findings.
    impression = [_affirm(name, lesions, gen) for name, lesions in case.findings.items()]
    # The order of these draws is part of the data: a dict evaluates its values in order.
    return {
        "ClinicalInformation_EN": _pick(_INDICATIONS, gen),
        "Technique_EN": _pick(_TECHNIQUES, gen),
        "Findings_EN": _shuffle(sentences, gen),
        "Impressions_EN": _shuffle(impression, gen) or _pick(_NORMAL, gen),
    }


def _pick(choices: tuple[str, ...], gen: Gen) -> str:
    return choices[gen.integers(len(choices))]


def _shuffle(sentences: list[str], gen: Gen) -> str:
    return " ".join(sentences[i] for i in gen.permutation(len(sentences)))


def _draw_term(name: str, gen: Gen) -> str:
    usual, rare = _TERMS[name]
    return usual if gen.random() < 0.7 else rare


def _affirm(name: str, lesions: Lesions, gen: Gen) -> str:
    """A sentence on a present finding, with the place and size of its largest lesion."""
    largest = max(lesions, key=lambda lesion: lesion.size_mm)
    side = largest.side
    if name == "Pleural effusion" and len({lesion.side for lesion in lesions}) > 1:
        side = "bilateral"
    words = {
        "term": _draw_term(name, gen),
        "side": side,
        "zone": largest.zone or "lower",
        "size": str(round(largest.size_mm)),
        "amount": _amount(name, largest.size_mm),
    }
    text = _pick(_POSITIVE[name], gen).format(**words)
    # "on the bilateral side" is no English.
    text = text.replace("the bilateral side", "both sides").replace("the bilateral", "both sides")
    return _capitalize(text)


def _amount(name: str, size_mm: float) -> str:
    # Limits in mm: about thirds of the depths that are drawn, 8-22 (pericardium) and 14-65 (pleura).
    small, large = (12, 17) if name == "Pericardial effusion" else (28, 48)
    if size_mm < small:
        return "small"
    return "large" if size_mm > large else "moderate"


def _negate(name: str, gen: Gen) -> str:
    template = _pick(_NEGATIVE, gen)
    return _capitalize(template.format(term=_draw_term(name, gen)))


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]
