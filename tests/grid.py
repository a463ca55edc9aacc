"""The numerical tests with ten seeds on several instruction sets, freshly compiled and cached, on one and two threads.

    make grid
    python tests/grid.py --out docs/_static/grid-cpu.csv

Twenty-four processes of pytest, two at a time; each runs the tests marked `numerical` with ten seeds. torch's kernels
are those of `ATEN_CPU_CAPABILITY` (those of the processor if it is not set), and numba compiles for the processor or
for the most basic one of its family. The first process of a pair compiles into an empty cache, and the second
one reads from that cache. Exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ATEN = {"default": "default", "avx2": "avx2", "own": None}
NUMBA = {"generic": "generic", "own": None}


def environment(aten: str, processor: str, threads: int, folder: Path) -> dict[str, str]:
    """Environment variables of a process; the caches of its compilers are in `folder`."""
    wanted = {
        "ATEN_CPU_CAPABILITY": ATEN[aten],
        "NUMBA_CPU_NAME": NUMBA[processor],
        "NUMBA_CACHE_DIR": str(folder / "numba"),
        "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=folder),
        "SSMKIT_TEST_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",  # threads that wait actively take the time of the other process
    }
    kept = {key: value for key, value in os.environ.items() if key not in wanted}
    return kept | {key: value for key, value in wanted.items() if value is not None}


def run(arguments: argparse.Namespace, aten: str, processor: str, threads: int) -> list[list[str]]:
    """The rows of a process with an empty cache and of a second one that uses the cache of the first."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("fresh", "cached"):
            name = [aten, processor, cache, str(threads)]
            command = [sys.executable, "-m", "pytest", "-q", "-m", "numerical", "-p", "no:cacheprovider"]
            command += ["--seeds", str(arguments.seeds), *arguments.tests]
            variables = environment(aten, processor, threads, Path(folder))
            start = time.monotonic()
            done = subprocess.run(
                command, env=variables, cwd=Path(__file__).parents[1], text=True, capture_output=True, check=False
            )
            counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
            passed, failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
            if done.returncode not in (0, 1) or not passed + failed:
                failed += 1
            rows.append([*name, str(passed), str(failed), f"{(time.monotonic() - start) / 60:.1f}"])
            print(*(f"{cell:>10}" for cell in rows[-1]), flush=True)
            if failed:
                print(done.stdout[-5000:], done.stderr[-2000:], flush=True)
    return rows


def main() -> int:
    """Prints a line per process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds in each process (default: 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--out", type=Path, help="where to write the table as CSV")
    parser.add_argument("tests", nargs="*", default=["tests"], help="files to run (default: tests)")
    arguments = parser.parse_args()
    header = ["torch", "numba", "program", "threads", "passed", "failed", "minutes"]
    print(*(f"{cell:>10}" for cell in header), flush=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        cases = [pool.submit(run, arguments, *case) for case in product(ATEN, NUMBA, (1, 2))]
        rows = [row for case in cases for row in case.result()]
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    failed = sum(int(row[5]) for row in rows)
    print("all processes passed" if not failed else f"{failed} tests failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
