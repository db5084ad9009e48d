"""What the folder of a fitted classifier holds."""

import re
from dataclasses import fields

from ctrl_rl.classifiers.calibration import CalibrationReport
from ctrl_rl.classifiers.classifier import DESCRIPTION_FILE, WEIGHTS_FILE
from ctrl_rl.products import Product

REPORT_FILE, DIAGRAM_FILE = "report.json", "reliability.png"
_FILES = (WEIGHTS_FILE, DESCRIPTION_FILE, REPORT_FILE, DIAGRAM_FILE)

CLASSIFIER = Product(
    name="classifier",
    files=re.compile("|".join(map(re.escape, _FILES))),
    told_by=REPORT_FILE,
    fields=frozenset(field.name for field in fields(CalibrationReport)),
)
