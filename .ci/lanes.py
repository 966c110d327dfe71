"""Compare two runs of the tests: `python .ci/lanes.py without.xml with.xml`.

The first is the JUnit report of all tests without torch, the second that of `-m torch` with it. Fails where the first
skipped a test that the second did not run, or the second ran one that the first did not skip.
"""

import sys
from xml.etree import ElementTree


def read(path):
    """The skipped tests and all tests of a report, by module and name; of a skipped module the name is ''."""
    cases = [
        ((case.get("classname") or case.get("name"), case.get("name") if case.get("classname") else ""), case)
        for case in ElementTree.parse(path).iter("testcase")
    ]
    return {name for name, case in cases if case.find("skipped") is not None}, {name for name, _ in cases}


skipped, _ = read(sys.argv[1])
not_run, run = read(sys.argv[2])
modules = {module for module, name in skipped if not name}
lost = {test for test in skipped if test[1] and test not in run} | {(m, "") for m in modules - {m for m, _ in run}}
more = {test for test in run if test not in skipped and test[0] not in modules}
for what, tests in (("skipped without torch, and not run by -m torch", lost), ("skipped by both", not_run),
                    ("run by -m torch, and not skipped without torch", more)):  # fmt: skip
    for test in sorted(tests):
        print(f"{what}: {'::'.join(filter(None, test))}", file=sys.stderr)
if lost or more or not_run or not run:
    sys.exit("the lanes without and with torch are not two halves of the tests")
print(f"{len(run)} tests need torch: skipped without it, and run with it")
