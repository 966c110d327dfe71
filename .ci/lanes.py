"""Fail where every lane skipped a test, or where the lane with torch did not run exactly the tests skipped without it.

`python .ci/lanes.py report.xml ...`: the lanes' JUnit reports, among them without-torch.xml and with-torch.xml.
"""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree


def read(path):
    """Return the tests that a lane ran, and those that it skipped; '' stands for a module that was skipped as a whole.

    With xdist such a module is not in the report at all.
    """
    tests = {True: set(), False: set()}
    for case in ElementTree.parse(path).iter("testcase"):
        name = re.sub("0x[0-9a-f]+", "0x", case.get("name"))  # the address of an object differs between processes
        test = (case.get("classname"), name) if case.get("classname") else (name, "")
        tests[case.find("skipped") is not None].add(test)
    return tests[False], tests[True]


lanes = {Path(path).stem: read(path) for path in sys.argv[1:]}
with_torch, _ = lanes["with-torch"]
ran_without, for_torch = lanes["without-torch"]
reported = {module for module, _ in ran_without | for_torch}
run = set().union(*(run for run, _ in lanes.values()))
run |= {(module, "") for module, _ in run}
wrong = [
    f"{lane} skipped {'::'.join(test)}, and no lane ran it"
    for lane, (_, skipped) in lanes.items()
    for test in skipped - run
]
wrong += [
    f"with-torch ran {'::'.join(test)}, and without-torch did not skip it"
    for test in with_torch
    if test not in for_torch and test[0] in reported and (test[0], "") not in for_torch
]
modules = {(module, "") for module, _ in with_torch}
wrong += [
    f"without-torch skipped {'::'.join(t)}, and with-torch did not run it" for t in for_torch - with_torch - modules
]
summary = f"{len(with_torch)} tests need torch or frameworks: one lane skipped them, and the other ran them"
print("\n".join(sorted(wrong)) or summary)
sys.exit(bool(wrong or not with_torch))
