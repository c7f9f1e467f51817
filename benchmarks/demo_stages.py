"""
Where the demo's minutes go: the seconds of each of its stages, as its progress bars tell them.

    python benchmarks/demo_stages.py --output FOLDER

`FOLDER` is that of a new demo. A stage lasts from the first line of its bar to that of the next one, so that loading
and files count for the stage before. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

# Ours begin in lower case, those of loading weights do not.
BAR = re.compile(rb"(?:^|[\r\n])([a-z ]+):\s+\d+%\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    if output.exists():
        parser.error(f"{output} is there: a demo that goes on would take no time for what it has")
    command = [sys.executable, "-m", "hf_recontrol", "demo", "--output", output]
    begun = [("start and loading", time.perf_counter())]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while said := process.stderr.read1():
            for name in (found.strip().decode() for found in BAR.findall(said)):
                if name not in (seen for seen, _ in begun):
                    begun.append((name, time.perf_counter()))
    end = time.perf_counter()
    if process.returncode:
        raise SystemExit(f"The demo failed: {output} says how far it came.")
    whole = end - begun[0][1]
    print("| stage | s | share |\n|---|---:|---:|")
    for (name, start), following in zip(begun, [*(start for _, start in begun[1:]), end], strict=True):
        print(f"| {name} | {following - start:.1f} | {(following - start) / whole:.0%} |")
    print(f"| all | {whole:.1f} | |")


if __name__ == "__main__":
    main()
