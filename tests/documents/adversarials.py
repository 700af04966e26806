"""Sixty answers that a scorer gets wrong if it looks for letters instead of words, numbers and units."""

from medvl.documents.fields import Diagnosis, Fields, Lab, Medication

# (kind of term, what the text says, the term, whether it is stated)
TERMS = [
    ("diagnoses", "Patient admitted overnight", "DM", False),
    ("diagnoses", "Family doctor informed", "MI", False),
    ("diagnoses", "Amitriptyline 25 mg at night", "MI", False),
    ("diagnoses", "History of MI in 2019", "myocardial infarction", True),
    ("diagnoses", "COPD, stable", "Chronic obstructive pulmonary disease", True),
    ("diagnoses", "No pneumonia", "pneumonia", False),
    ("diagnoses", "Patient denies chest pain, cough and fever", "fever", False),
    ("diagnoses", "Pneumonia was ruled out", "pneumonia", False),
    ("diagnoses", "No fever, but pneumonia in the left lobe", "pneumonia", True),
    ("diagnoses", "No change in the known pneumonia", "pneumonia", True),
    ("diagnoses", "Family history of MI", "MI", False),
    ("diagnoses", "Treated as outpatient", "AS", False),
    ("diagnoses", "CKD stage 3", "CKD", True),
    ("diagnoses", "Chest film without pneumothorax", "pneumothorax", False),
    ("frequencies", "Metformin 500 mg b.i.d.", "BID", True),
    ("frequencies", "Metformin 500 mg twice daily", "BID", True),
    ("frequencies", "Morphine 2 mg every 4 hours", "Q4H", True),
    ("frequencies", "Acetaminophen as needed", "PRN", True),
    ("routes", "Take by mouth", "PO", True),
    ("routes", "Point tenderness", "PO", False),
    ("labs", "Calcium 8.9 mg/dL", "Mg", False),
]

# (what the text says, the value, whether it is stated)
VALUES = [
    ("Amlodipine 25 mg", "5 mg", False),
    ("Creatinine 11.2 mg/dL", "1.2 mg/dL", False),
    ("Creatinine 1.25", "1.2", False),
    ("BP 120/80 mmHg", "120/80 mmHg", True),
    ("BP 120/80", "120", False),
    ("BP 80/120", "120/80", False),
    ("HbA1c 8,4 %", "8.4 %", True),
    ("HbA1c 8.4%", "8.4 %", True),
    ("Sodium chloride 1,200 mg", "1.2 mg", False),
    ("Heparin 5,000 units", "5000 U", True),
    ("Digoxin 125 \u00b5g", "125 \u03bcg", True),
    ("Digoxin 125 mcg", "125 ug", True),
    ("Digoxin 125 mg", "125 mcg", False),
    ("eGFR >60 mL/min", ">60 mL/min", True),
    ("eGFR >60 mL/min", "60 mL/min", False),
    ("Oxycodone 5-10 mg", "5-10 mg", True),
    ("Oxycodone 5 to 10 mg", "5\u201310 mg", True),
    ("Oxycodone 5-10 mg", "10 mg", False),
    ("Base excess \u22122.5 mmol/L", "-2.5 mmol/L", True),
    ("T score -2.5", "2.5", False),
    ("WBC 7.2 x10\u2079/L", "7.2 x10^9/L", True),
    ("WBC 7.2 x10^12/L", "7.2 x10^9/L", False),
    ("Amoxicillin 5 mg/5 mL", "5 mg", False),
    ("Amoxicillin 250 mg per 5 mL", "250 mg/5 mL", True),
    ("Vitamin B12 300 pg/mL", "12", False),
    ("INR 1.10", "1.1", True),
    ("Glucose 100mg/dL", "100 mg/dL", True),
]

_DRUGS = Fields(
    medications=[
        Medication("Metformin", "500", "mg", "PO", "BID"),
        Medication("Lisinopril", "10", "mg", "PO", "QD"),
    ]
)
_GLUCOSE = Fields(labs=[Lab("Glucose", "92", "mg/dL"), Lab("Glucose", "143", "mg/dL")])
_PAIN = Fields(medications=[Medication("Oxycodone", "5", "mg", "PO", "Q6H", prn=True)])
_COPD = Fields(diagnoses=[Diagnosis("COPD"), Diagnosis("Pneumonia")])

# (what the page says, the answer, the fields of it that are right, false and missed)
PAGES = [
    # medications in another order
    (
        _DRUGS,
        '{"medications":[{"name":"lisinopril","dose":"10","unit":"mg","route":"PO","frequency":"QD"},'
        '{"name":"metformin","dose":"500","unit":"mg","route":"PO","frequency":"BID"}]}',
        (10, 0, 0),
    ),
    # each drug with the other's dose
    (
        _DRUGS,
        '{"medications":[{"name":"Metformin","dose":"10","unit":"mg","route":"PO","frequency":"BID"},'
        '{"name":"Lisinopril","dose":"500","unit":"mg","route":"PO","frequency":"QD"}]}',
        (8, 2, 2),
    ),
    # one test twice, in another order
    (
        _GLUCOSE,
        '{"labs":[{"name":"Glucose","value":"143","unit":"mg/dL"},{"name":"Glucose","value":"92","unit":"mg/dL"}]}',
        (6, 0, 0),
    ),
    # one entry twice that the page has once
    (
        Fields(labs=[Lab("INR", "1.1")]),
        '{"labs":[{"name":"INR","value":"1.1"},{"name":"INR","value":"1.1"}]}',
        (2, 2, 0),
    ),
    # nothing
    (_DRUGS, " \n", (0, 0, 10)),
    # cut off within a value: "14" is not taken for 143
    (
        _GLUCOSE,
        '{"labs":[{"name":"Glucose","value":"92","unit":"mg/dL"},{"name":"Glucose","value":14',
        (4, 0, 2),
    ),
    # in a fence, with other keys, numbers as numbers, dose and unit as one text
    (
        _DRUGS,
        'Here you are:\n```json\n{"meds": [{"drug": "Metformin", "dosage": "500 mg", "sig": "PO BID"}, '
        '{"drug": "Lisinopril", "strength": 10, "units": "mg", "route": "PO", "freq": "once daily"}]}\n```',
        (10, 0, 0),
    ),
    # prose
    (
        _DRUGS,
        "The patient takes Metformin 500 mg by mouth twice daily and Lisinopril 10 mg PO daily.",
        (10, 0, 0),
    ),
    # as needed, in words and within the frequency
    (_PAIN, "Oxycodone 5 mg PO every 6 hours as needed for pain", (6, 0, 0)),
    # mEq/L is mmol/L for an ion of one charge
    (Fields(labs=[Lab("Potassium", "4.1", "mmol/L")]), '{"labs":{"K":"4.1 mEq/L"}}', (3, 0, 0)),
    # ... and not for one of two
    (Fields(labs=[Lab("Calcium", "2.3", "mmol/L")]), '{"labs":{"Ca":"2.3 mEq/L"}}', (1, 2, 2)),
    # a denied diagnosis is not stated
    (_COPD, '{"diagnoses":["chronic obstructive pulmonary disease (COPD)","No pneumonia"]}', (1, 0, 1)),
]
