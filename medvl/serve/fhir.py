"""The fields of a page as a Bundle of FHIR R4: what a hospital's system can take over, and see what to distrust.

Nothing is coded that the page does not say: names are `text`, without LOINC, SNOMED CT or RxNorm. Source: HL7 FHIR
R4 (4.0.1), https://hl7.org/fhir/R4/.
"""

import base64
import functools
import re
import tomllib
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from medvl.documents.evidence import Evidence, Value
from medvl.documents.fields import Fields, Lab, Medication, Patient, Vital, fields_to_json, leaves
from medvl.documents.quantities import normalise_flag, parse_quantity, same_term, same_unit, spell

Json = dict[str, Any]
_TERMS = "http://terminology.hl7.org/CodeSystem/"
_UCUM = "http://unitsofmeasure.org"
_ABSENT = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"
_OURS = "urn:x-medvl:"  # names of our own extensions
_DIGITS = 15  # of a number; with more a float would be another one

# Where a code may stand, by the end of its path, and which it may be: the value sets of R4, as far as they are used.
_BINDINGS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "meta.security": ("v3-ObservationValue", ("UNCERTREL",)),
    "category.coding": ("observation-category", ("laboratory", "vital-signs")),
    "interpretation.coding": ("v3-ObservationInterpretation", ("H", "L", "HH", "LL", "N", "A")),
    "dataAbsentReason.coding": ("data-absent-reason", ("unknown", "error")),
    "verificationStatus.coding": ("condition-ver-status", ("unconfirmed",)),
    "agent.type.coding": ("provenance-participant-type", ("assembler",)),
    "timing.code.coding": (
        "v3-GTSAbbreviation",
        (
            *("BID", "TID", "QID", "AM", "PM", "QD", "QOD", "BED", "WK", "MO"),
            *("Q1H", "Q2H", "Q3H", "Q4H", "Q6H", "Q8H"),
        ),
    ),
}
_STATUS = {  # of each type of resource; "" = it has none
    "Patient": "",
    "Observation": "preliminary",
    "MedicationStatement": "unknown",
    "Condition": "",
    "Procedure": "unknown",
    "DocumentReference": "current",
    "Provenance": "",
    "OperationOutcome": "",
}
_ISSUES = {"informational": "information", "incomplete": "warning"}  # codes of issues with their severity


def make_bundle(
    fields: Fields,
    evidence: Evidence,
    *,
    software: str,
    model: str,
    made_at: datetime,
    request: str,
    disclaimer: str = "",
    notices: Sequence[str] = (),
) -> Json:
    """A Bundle of type collection: patient, tests, vital signs, medications, diagnoses, procedures, the running text,
    and for each of them a Provenance.

    A resource with a value that is not verified, or that is warned of, has the security label UNCERTREL ("uncertain
    reliability") and a note that names the values; so has one of which `drop_unverified` left something out. The Provenance of a resource names software and model, and in the
    extension "urn:x-medvl:evidence" of its entity each value as text with its status, score, page (from 1) and box.

    The patient is a resource of its own with what the page says: no date of birth is made of an age. The age and the
    date of the page are extensions of it. What does not fit a type is text ("negative", "~5", a date).

    Args:
        evidence: for these fields, from `check_fields` or `drop_unverified`; a value it does not have is unverified.
        software: with its version.
        made_at: with its time zone.
        request: id of the request: the same request with the same fields has the same `fullUrl`s.
        disclaimer: an issue, "informational", of the Bundle's OperationOutcome.
        notices: why the whole may not be complete (an answer that was cut): issues, "incomplete". So are entries that
            were left out whole.
    Raises:
        ValueError: `made_at` has no time zone.
    """
    if made_at.tzinfo is None:
        raise ValueError(
            "make_bundle: made_at must have a time zone, got none; use datetime.now(timezone.utc)"
        )
    content = f"{request}\n{fields_to_json(fields)}\n".encode("ascii", "backslashreplace").decode()

    def url(part: str) -> str:
        return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content + part)}"

    entries = list[Json]()
    provenances = list[Json]()
    for path, resource in _resources(fields, evidence).items():
        values = _values_of(path, fields, evidence)
        warnings = [w.message for w in evidence.warnings if w.path == path or w.path.startswith(f"{path}/")]
        unverified = [value for value in values if not value.verified]
        _mark(resource, unverified, _left_out(path, evidence), warnings)
        if path != "patient":
            resource["subject"] = {"reference": url("patient")}
        entity = {
            "extension": [_evidence(value) for value in values],
            "role": "source",
            "what": {"display": f"pages of request {request}"},
        }
        provenance = {
            "resourceType": "Provenance",
            "target": [{"reference": url(path)}],
            "recorded": made_at.isoformat(),
            "agent": [
                {
                    "type": {"coding": [_coding("agent.type.coding", "assembler")]},
                    "who": {"type": "Device", "display": f"{software}, model {model}"},
                }
            ],
            "entity": [entity],
        }
        entries.append({"fullUrl": url(path), "resource": resource})
        provenances.append({"fullUrl": url(f"provenance/{path}"), "resource": provenance})
    if outcome := _outcome(disclaimer, [*notices, *_entries_left_out(evidence)]):
        provenances.append({"fullUrl": url("outcome"), "resource": outcome})
    bundle = {"resourceType": "Bundle", "type": "collection", "timestamp": made_at.isoformat()}
    bundle = _clean(bundle | {"entry": entries + provenances})
    check_bundle(bundle)
    return bundle


# Resources --------------------------------------------------------------------------------------------------
def _resources(fields: Fields, evidence: Evidence) -> dict[str, Json]:
    """The resources of fields by the path of their record, without subject."""
    resources: dict[str, Json] = {"patient": _patient(fields.patient)}
    for i, lab in enumerate(fields.labs):
        resources[f"labs/{i}"] = _observation(lab, "laboratory", _left_out(f"labs/{i}", evidence))
    for i, vital in enumerate(fields.vitals):
        resources[f"vitals/{i}"] = _observation(vital, "vital-signs", _left_out(f"vitals/{i}", evidence))
    for i, medication in enumerate(fields.medications):
        resources[f"medications/{i}"] = _medication(medication, _left_out(f"medications/{i}", evidence))
    for i, diagnosis in enumerate(fields.diagnoses):
        status = {"coding": [_coding("verificationStatus.coding", "unconfirmed")]}
        condition = {"resourceType": "Condition", "verificationStatus": status}
        resources[f"diagnoses/{i}"] = condition | {"code": _concept(diagnosis.name)}
    for i, name in enumerate(fields.procedures):
        procedure = {"resourceType": "Procedure", "status": "unknown"}
        resources[f"procedures/{i}"] = procedure | {"code": _concept(name)}
    if _clean(fields.text):
        resources["text"] = _document(fields)
    return resources


def _patient(patient: Patient) -> Json:
    resource: Json = {"resourceType": "Patient"}
    printed = {"age": patient.age, "page-date": patient.date}
    if any(printed.values()):
        resource["extension"] = [_extension(name, text) for name, text in printed.items() if text]
    if patient.record:
        resource["identifier"] = [{"type": {"text": "number of the medical record"}, "value": patient.record}]
    if patient.name:
        resource["name"] = [{"text": patient.name}]
    for gender in ("female", "male"):
        if same_term(patient.sex, gender, "sexes"):
            resource["gender"] = gender
    if patient.sex and "gender" not in resource:
        resource.setdefault("extension", []).append(_extension("sex", patient.sex))
    return resource


def _observation(row: Lab | Vital, category: str, left_out: Sequence[str]) -> Json:
    # "error": a value was stated that no page shows; "unknown": none was stated.
    error = {"dataAbsentReason": {"coding": [_coding("dataAbsentReason.coding", "error")]}}
    resource: Json = {
        "resourceType": "Observation",
        "status": "preliminary",
        "category": [{"coding": [_coding("category.coding", category)]}],
        "code": _concept(row.name),
    } | (error if "value" in left_out else _value_of(row))
    if isinstance(row, Lab):
        if row.flag:
            code = normalise_flag(row.flag)
            known = (
                [_coding("interpretation.coding", code)]
                if code in _BINDINGS["interpretation.coding"][1]
                else []
            )
            resource["interpretation"] = [{"coding": known, "text": row.flag}]
        if row.low or row.high:
            resource["referenceRange"] = [_range(row)]
    return resource


def _value_of(row: Lab | Vital) -> Json:
    """The value[x] of an observation, or the two components of a blood pressure."""
    if not _clean(row.value):
        return {"dataAbsentReason": {"coding": [_coding("dataAbsentReason.coding", "unknown")]}}
    text = {"valueString": row.value}
    quantity = parse_quantity(row.value)
    if quantity is None or (row.unit and quantity.unit and not same_unit(quantity.unit, row.unit, row.name)):
        return text
    unit = row.unit or quantity.unit
    numbers = [_quantity(number, unit) for number in quantity.numbers]
    if None in numbers or quantity.sign == "~" or quantity.join == "date":
        return text
    if quantity.join == "" and numbers[0]:
        comparator = {"comparator": quantity.sign} if quantity.sign else {}
        return {"valueQuantity": numbers[0] | comparator}
    if quantity.sign:
        return text
    if quantity.join == "-" and quantity.numbers[0] <= quantity.numbers[1]:
        return {"valueRange": dict(zip(("low", "high"), numbers, strict=True))}
    if quantity.join == "/" and same_term(row.name, "blood pressure", "vitals"):
        names = ("Systolic blood pressure", "Diastolic blood pressure")
        pairs = zip(names, numbers, strict=True)
        return {"component": [{"code": {"text": name}, "valueQuantity": number} for name, number in pairs]}
    return text


def _range(lab: Lab) -> Json:
    """A reference range; an end that is no plain number is text."""
    ends: Json = {}
    for name, text, sign in (("low", lab.low, ">"), ("high", lab.high, "<")):
        quantity = parse_quantity(text) if text else None
        if quantity and len(quantity.numbers) == 1 and quantity.sign.strip("=") in ("", sign):
            ends[name] = _quantity(quantity.numbers[0], lab.unit)
    if not all(ends.get(name) for name, text in (("low", lab.low), ("high", lab.high)) if text):
        return {"text": " - ".join(filter(None, (lab.low, lab.high)))}
    return ends


def _medication(medication: Medication, left_out: Sequence[str]) -> Json:
    printed = {
        "dose": f"{medication.dose} {medication.unit}".strip(),
        "route": medication.route,
        "frequency": medication.frequency,
        "prn": "as needed" if medication.prn else "",
    }
    # The rest must not read as a whole: "IM QW" without its dose.
    words = [f"[{name} left out]" if name in left_out else text for name, text in printed.items()]
    dosage: Json = {"text": " ".join(filter(None, words))}
    if medication.frequency:
        codes = [
            _coding("timing.code.coding", code)
            for code, term in _tables()["timing"].items()
            if same_term(term, medication.frequency, "frequencies")
        ]
        dosage["timing"] = {"code": {"coding": codes, "text": medication.frequency}}
    if medication.prn:
        dosage["asNeededBoolean"] = True
    if medication.route:
        dosage["route"] = {"text": medication.route}
    value = _value_of(Lab(medication.name, medication.dose, medication.unit))
    if quantity := value.get("valueQuantity"):
        dosage["doseAndRate"] = [{"doseQuantity": quantity}]
    elif ends := value.get("valueRange"):
        dosage["doseAndRate"] = [{"doseRange": ends}]
    resource: Json = {"resourceType": "MedicationStatement", "status": "unknown"}
    resource["medicationCodeableConcept"] = _concept(medication.name)
    return resource | ({"dosage": [dosage]} if _clean(dosage["text"]) else {})


def _document(fields: Fields) -> Json:
    """The running text of the pages."""
    data = base64.b64encode(fields.text.encode("utf-8", "replace")).decode()
    attachment = {"contentType": "text/plain; charset=utf-8", "data": data}
    kind = {"type": {"text": fields.kind}} if fields.kind else {}
    document = {"resourceType": "DocumentReference", "status": "current", "docStatus": "preliminary"}
    return document | kind | {"content": [{"attachment": attachment}]}


# Parts ------------------------------------------------------------------------------------------------------
@functools.cache
def _tables() -> Mapping[str, Mapping[str, str]]:
    return tomllib.loads(Path(__file__).with_name("fhir.toml").read_text(encoding="utf-8"))


def _coding(place: str, code: str) -> Json:
    return {"system": _TERMS + _BINDINGS[place][0], "code": code}


def _concept(text: str) -> Json:
    if not _clean(text):
        return {"extension": [{"url": _ABSENT, "valueCode": "unknown"}]}
    return {"text": text}


def _extension(name: str, text: str) -> Json:
    return {"url": _OURS + name, "valueString": text}


def _quantity(number: Any, unit: str) -> Json | None:
    """A number with its printed unit, and its UCUM code where that is certain; None for too many digits."""
    if len(number.as_tuple().digits) > _DIGITS:
        return None
    whole = number == number.to_integral_value()
    quantity: Json = {"value": int(number) if whole else float(number)}
    if unit.strip():
        quantity["unit"] = unit
    if code := _tables()["ucum"].get(_plain_unit(unit)):
        quantity |= {"system": _UCUM, "code": code}
    return quantity


def _plain_unit(unit: str) -> str:
    return "".join(spell(unit).casefold().replace("μ", "u").split())


def _values_of(path: str, fields: Fields, evidence: Evidence) -> list[Value]:
    """The evidence of a resource's values; one that there is none for is missing."""
    known = {value.path: value for value in evidence.values}
    values = list[Value]()
    for leaf, text in leaves(fields).items():
        if leaf == path or leaf.startswith(f"{path}/"):
            values.append(known.get(leaf) or Value(path=leaf, text=text, status="missing"))
    return values


def _left_out(path: str, evidence: Evidence) -> list[str]:
    """Names of the values that were left out of a record."""
    paths = [value.path for value in evidence.left_out]
    return [other.removeprefix(f"{path}/") for other in paths if other.startswith(f"{path}/")]


def _entries_left_out(evidence: Evidence) -> list[str]:
    """What is said of the entries, and of the text, that were left out whole."""
    counts = Counter(value.path for value in evidence.left_out if "/" not in value.path)
    return [f"left out of {name}, as no page shows it: {count}" for name, count in counts.items()]


def _outcome(disclaimer: str, notices: Sequence[str]) -> Json:
    """What is to be known of the whole Bundle."""
    rows = [("informational", disclaimer)] if disclaimer else []
    rows += [("incomplete", notice) for notice in notices]
    issues = [{"severity": _ISSUES[code], "code": code, "details": {"text": text}} for code, text in rows]
    return {"resourceType": "OperationOutcome", "issue": issues} if issues else {}


def _mark(resource: Json, unverified: list[Value], left_out: list[str], warnings: list[str]) -> None:
    """Label a resource that must not be taken for a verified one, and say why."""
    if not unverified and not left_out and not warnings:
        return
    names = [value.path.rpartition("/")[2] for value in unverified]
    named = ", ".join("name" if name.isdigit() else name for name in names)
    sentences = [f"Not verified on the page: {named}."] if unverified else []
    if left_out:
        sentences.append(f"Left out, as no page shows it: {', '.join(left_out)}.")
    sentences += [f"Warning: {warning}." for warning in warnings]
    text = " ".join([*sentences, "Compare it with the page."])
    resource["meta"] = {"security": [_coding("meta.security", "UNCERTREL")]}
    if resource["resourceType"] in ("Patient", "DocumentReference"):  # these have no notes
        resource.setdefault("extension", []).append(_extension("note", text))
    else:
        resource["note"] = [{"text": text}]


def _evidence(value: Value) -> Json:
    parts: list[Json] = [
        {"url": "path", "valueString": value.path},
        {"url": "status", "valueCode": value.status},
    ]
    if len(value.text) <= 200:  # the running text is in its DocumentReference
        parts.append({"url": "text", "valueString": value.text})
    if value.box is not None and value.page is not None:
        parts.append({"url": "score", "valueDecimal": round(value.score, 4)})
        parts.append({"url": "page", "valuePositiveInt": value.page + 1})
        parts.append({"url": "box", "valueString": " ".join(f"{edge:.1f}" for edge in value.box)})
    return {"url": _OURS + "evidence", "extension": parts}


def _clean(tree: Any) -> Any:
    """Without letters that FHIR or UTF-8 do not have, empty texts, lists and objects."""
    if isinstance(tree, str):
        return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]", " ", tree).strip()
    if isinstance(tree, list):
        return [part for part in map(_clean, tree) if part not in ("", [], {})]
    if isinstance(tree, dict):
        parts = {key: _clean(value) for key, value in tree.items()}
        return {key: part for key, part in parts.items() if part not in ("", [], {})}
    return tree


# Check ------------------------------------------------------------------------------------------------------
def check_bundle(bundle: Json) -> None:
    """Check what `fhir.resources` does not: codes and their systems, statuses, references and `fullUrl`s.

    Raises:
        ValueError: with the path of what is wrong, and no value.
    """
    if bundle.get("resourceType") != "Bundle" or bundle.get("type") != "collection":
        _fail("", "must be a Bundle of type collection")
    entries = bundle.get("entry", [])
    patients = set[str]()
    urls = set[str]()
    for i, entry in enumerate(entries):
        url = entry.get("fullUrl", "")
        if not re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", url) or url in urls:
            _fail(f"entry[{i}].fullUrl", "must be a urn:uuid that no other entry has")
        urls.add(url)
        if entry.get("resource", {}).get("resourceType") == "Patient":
            patients.add(url)
    for i, entry in enumerate(entries):
        path = f"entry[{i}].resource"
        _check_resource(entry.get("resource", {}), path, patients)
        for inner, node in _nodes(entry["resource"], path):
            _check_node(node, inner, urls)


def _check_resource(resource: Json, path: str, patients: set[str]) -> None:
    kind = resource.get("resourceType")
    if kind not in _STATUS:
        _fail(f"{path}.resourceType", f"must be one of {', '.join(_STATUS)}")
    elif resource.get("status", "") != _STATUS[kind]:
        _fail(f"{path}.status", f"must be {_STATUS[kind] or 'left out'}")
    if (
        kind not in ("Patient", "Provenance", "OperationOutcome")
        and resource.get("subject", {}).get("reference") not in patients
    ):
        _fail(f"{path}.subject", "must refer to a Patient of the Bundle")
    required = {"Observation": ("category", "code"), "Condition": ("verificationStatus", "code")}
    for name in required.get(str(kind), ()):
        if not resource.get(name):
            _fail(f"{path}.{name}", "must be there")
    if kind == "Observation":
        values = [key for key in resource if re.match("value[A-Z]|dataAbsentReason$|component$", key)]
        if len(values) != 1:
            _fail(path, "must have one value, components, or the reason why there is none")


def _check_node(node: Json, path: str, urls: set[str]) -> None:
    if "reference" in node and node["reference"] not in urls:
        _fail(f"{path}.reference", "must be the fullUrl of an entry")
    if node.get("comparator", "<") not in ("<", "<=", ">", ">="):
        _fail(f"{path}.comparator", "must be one of < <= > >=")
    if "code" not in node or isinstance(node["code"], dict):
        return
    plain = re.sub(r"\[\d+\]", "", path)
    if plain.endswith(".issue"):
        if node.get("severity") != _ISSUES.get(node["code"], ""):
            _fail(path, f"must have a code of {', '.join(_ISSUES)}, and its severity")
        return
    for place, (system, codes) in _BINDINGS.items():
        if plain.endswith(f".{place}"):
            if node.get("system") != _TERMS + system or node["code"] not in codes:
                _fail(path, f"must be a code of {system}: {', '.join(codes)}")
            return
    if node.get("system") != _UCUM or node["code"] not in _tables()["ucum"].values():
        _fail(path, "must have no code but one of the units in fhir.toml")


def _nodes(tree: Any, path: str) -> Iterator[tuple[str, Json]]:
    """Every object in a resource with its path."""
    if isinstance(tree, dict):
        yield path, tree
        for key, value in tree.items():
            yield from _nodes(value, f"{path}.{key}")
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _nodes(value, f"{path}[{i}]")


def _fail(path: str, must: str) -> None:
    raise ValueError(f"check_bundle: {path or 'it'} {must}")
