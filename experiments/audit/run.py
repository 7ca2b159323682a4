"""Look the exact versions of constraints.txt up among known vulnerabilities, and list what is installed (SBOM).

    make audit            # installs pip-audit and cyclonedx-bom in an environment of their own, then runs this

Prints how many versions could be looked up at all: without a way to the advisory database none can, which is no clean
bill. Exits with 1 where a known vulnerability was found. The SBOM (CycloneDX, JSON) is written to outputs/sbom.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SBOM = ROOT / "outputs" / "sbom.json"


def audited(tools: Path, constraints: Path) -> list[dict[str, object]]:
    """One record a version: its name, and its vulnerabilities or why it could not be looked up."""
    command = [tools / "pip-audit", "-r", constraints, "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off"], capture_output=True, text=True, check=False
    )
    if not done.stdout.strip():
        sys.exit(f"pip-audit gave no answer: {done.stderr.strip()[-300:]}")
    found: list[dict[str, object]] = json.loads(done.stdout)["dependencies"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tools", type=Path, required=True, help="folder of pip-audit and cyclonedx-py")
    parser.add_argument("--python", type=Path, required=True, help="interpreter whose environment is listed")
    options = parser.parse_args()
    records = audited(options.tools, ROOT / "constraints.txt")
    reached = [one for one in records if "vulns" in one]
    vulnerable = [one for one in reached if one["vulns"]]
    print(
        f"{len(records)} exact versions in constraints.txt: {len(reached)} looked up, {len(vulnerable)} with advisories"
    )
    for one in vulnerable:
        print(f"  {one['name']} {one['version']}: {', '.join(str(v['id']) for v in one['vulns'])}")  # type: ignore[attr-defined]
    if len(reached) < len(records):
        print(f"{len(records) - len(reached)} could not be looked up from here: this says nothing about them")
    SBOM.parent.mkdir(exist_ok=True)
    subprocess.run([options.tools / "cyclonedx-py", "environment", options.python, "-o", SBOM], check=True)
    print(
        f"{len(json.loads(SBOM.read_text())['components'])} installed packages listed in {SBOM.relative_to(ROOT)}"
    )
    sys.exit(bool(vulnerable))


if __name__ == "__main__":
    main()
