"""Say which tests failed and how many pytest ran, from the reports that the nox sessions left in a folder."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
for report in sorted(Path(sys.argv[1]).glob("*.xml")):
    for suite in ET.parse(report).getroot().iter("testsuite"):  # noqa: S314 - pytest's own
        for name in totals:
            totals[name] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            for wrong in (*case.iter("failure"), *case.iter("error")):
                said = wrong.get("message", "").strip().partition("\n")[0][:200]
                print(f"{report.stem}: {case.get('classname')}::{case.get('name')}: {said}")  # noqa: T201
failed = totals["failures"] + totals["errors"]
passed = totals["tests"] - failed - totals["skipped"]
print(f"{passed} passed, {failed} failed, {totals['skipped']} skipped")  # noqa: T201
sys.exit(failed > 0 or passed == 0)
