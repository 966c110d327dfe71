"""The files around the package: metadata, workflows, templates, and the scripts of .ci/."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import fastrms

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in GITHUB.glob("workflows/*.yml")}
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIG["project"]
SCRIPTS = sorted(path for path in (ROOT / ".ci").iterdir() if path.is_file() and not path.suffix)
ADDRESS = "https://example.org/owner/fastrms"


def text_of(*parts):
    return ROOT.joinpath(*parts).read_text(encoding="utf-8")


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


# ---- workflows and scripts


def test_the_workflows_are_there():
    assert sorted(WORKFLOWS) == ["ci.yml", "links.yml", "release.yml"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_scripts_that_a_workflow_calls_are_there(name):
    commands = "\n".join(step["run"] for step in steps(WORKFLOWS[name]) if "run" in step)
    assert all((ROOT / script).is_file() for script in re.findall(r"\.ci/[\w.]+", commands))
    assert all(f"[{extra}]" in commands and extra in EXTRAS for extra in re.findall(r"\.\[(\w+)\]", commands))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_only_read_except_where_it_publishes(name):
    workflow = WORKFLOWS[name]
    assert workflow["permissions"] == {"contents": "read"}
    allowed = {job: each["permissions"] for job, each in workflow["jobs"].items() if "permissions" in each}
    assert allowed == ({"publish": {"id-token": "write"}} if name == "release.yml" else {})


def test_a_release_waits_for_the_tests_and_the_checks_of_the_package():
    jobs = WORKFLOWS["release.yml"]["jobs"]
    assert set(jobs["publish"]["needs"]) == {"tests", "package"}
    assert jobs["tests"]["uses"] == "./.github/workflows/ci.yml"
    assert [step["run"].split()[-1] for step in jobs["package"]["steps"] if ".ci/package" in step.get("run", "")] == [
        "dist"
    ]


def test_the_workflow_runs_everything_once_and_the_tests_on_every_python_that_the_metadata_names():
    jobs = WORKFLOWS["ci.yml"]["jobs"]
    assert [step["run"] for step in jobs["everything"]["steps"] if "run" in step] == ["bash .ci/run"]
    rows = jobs["tests"]["strategy"]["matrix"]["include"]
    setup = next(step["with"] for step in jobs["everything"]["steps"] if "setup-python" in step.get("uses", ""))
    assert {row["python"] for row in rows} | {setup["python-version"]} == PYTHONS
    assert {row["os"].partition("-")[0] for row in rows} == {"ubuntu", "macos", "windows"}
    assert any(row["os"].endswith("-arm") for row in rows)


@pytest.mark.skipif(os.name != "posix", reason="files of Windows have no mode")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_executed_and_stop_at_the_first_error(script):
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


def test_scripts_that_the_main_one_calls_are_there():
    called = set(re.findall(r"\.ci/[\w.]+", text_of(".ci", "run")))
    assert {".ci/readme", ".ci/package", ".ci/lanes.py"} <= called
    assert all((ROOT / script).is_file() for script in called)


@pytest.mark.parametrize("ending", ["fastrms demo", "pytest"])
def test_readme_has_the_commands_that_ci_runs(ending):
    assert len(re.findall(rf"^    python -m pip install .* && .*{ending}$", text_of("README.md"), re.M)) == 1
    assert f".ci/readme {ending}" in text_of(".ci", "run").replace('"', "")


# ---- templates


@pytest.mark.parametrize("path", sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_github_needs(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


def test_links_of_templates_lead_somewhere():
    for path in GITHUB.rglob("*.*"):
        for target in re.findall(r"\]\(([^):]+)\)", path.read_text(encoding="utf-8")):
            place = ROOT / target.removeprefix("../blob/main/") if "/blob/main/" in target else path.parent / target
            assert place.is_file(), f"{path.name}: {target}"


# ---- metadata


EXTRAS = PROJECT["optional-dependencies"].keys()
PYTHONS = {word.split(" :: ")[-1] for word in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", word)}


def test_the_metadata_are_complete():
    assert PROJECT["authors"][0]["name"] in text_of("LICENSE")
    assert {"name", "description", "license", "license-files", "keywords", "requires-python"} <= PROJECT.keys()
    assert sorted(PROJECT["dynamic"]) == ["readme", "urls", "version"]
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "fastrms" / "py.typed").is_file()
    assert min(PYTHONS, key=lambda version: int(version[2:])) == PROJECT["requires-python"].removeprefix(">=")


def test_the_policy_page_has_the_versions_of_the_metadata():
    page = text_of("docs", "policy.md")
    assert set(re.findall(r"^\| Python (3\.\d+)", page, re.M)) == PYTHONS
    bounds = dict(dependency.split(">=") for dependency in PROJECT["dependencies"])
    expected = f"Python {PROJECT['requires-python'][2:]}, NumPy {bounds['numpy']} and Numba {bounds['numba']}"
    assert expected in " ".join(page.split())


def test_the_sdist_leaves_out_nothing_that_git_has():
    """Tests read README, docs/, benchmarks/, .ci/ and .github/; .ci/package compares the files of a built sdist."""
    assert CONFIG["tool"]["hatch"]["build"]["targets"]["sdist"] == {"exclude": ["/.git"]}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((GITHUB / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == fastrms.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_pages_install_fastrms_from_a_clone_with_extras_that_are_there(page):
    """It is on no package index."""
    for line in re.findall(r"^.*pip install.*$", page.read_text(encoding="utf-8"), re.M):
        assert not re.search(r"pip install [^&`]*\bfastrms\b", line), line
        for extras in re.findall(r'"\.\[([\w,-]+)\]"', line):
            assert set(extras.split(",")) <= EXTRAS, line


# ---- README on a package index, and releases


def built(repository):
    pytest.importorskip("hatchling")
    hook = load("build_metadata").Hook(str(ROOT), {"repository": repository})
    metadata = {"version": "1.2.3"}
    hook.update(metadata)
    return metadata


def test_without_an_address_links_stay_relative_and_there_are_no_urls():
    assert built("") == {
        "version": "1.2.3", "urls": {}, "readme": {"content-type": "text/markdown", "text": text_of("README.md")},
    }  # fmt: skip


def test_with_an_address_every_link_of_readme_is_absolute_and_nothing_else_changes():
    metadata = built(ADDRESS)
    text = metadata["readme"]["text"]
    targets = re.findall(r'\]\(([^)]+)\)|(?:src|srcset|href)="([^"]+)"', text)
    assert [target for pair in targets for target in pair if target and not re.match("https://|#", target)] == []
    assert f"]({ADDRESS}/blob/v1.2.3/docs/start.md)" in text
    back = re.sub(rf"{re.escape(ADDRESS)}/(?:blob|raw)/v1\.2\.3/", "", text)
    assert back == text_of("README.md")
    assert len(metadata["urls"]) == 4
    assert all(url.startswith(ADDRESS) for url in metadata["urls"].values())


def test_pictures_are_linked_as_files_and_headings_stay():
    pytest.importorskip("hatchling")
    absolute = load("build_metadata").absolute
    text = 'a [b](#c) ![d](docs/e.png) <img src="f/g.svg"> [h](https://i.j) [k](docs/l.md#m)'
    assert absolute(text, ADDRESS, "v1") == (
        f'a [b](#c) ![d]({ADDRESS}/raw/v1/docs/e.png) <img src="{ADDRESS}/raw/v1/f/g.svg"> [h](https://i.j) '
        f"[k]({ADDRESS}/blob/v1/docs/l.md#m)"
    )


@pytest.fixture
def tree(tmp_path):
    """The files that a release must agree in, ready to be released as 1.2.3."""
    for name, text in {
        "fastrms/__init__.py": '__version__ = "1.2.3"\n',
        "docs/changelog.md": "# Changelog\n\n## 1.2.3 - 2027-01-31\n",
        ".github/CITATION.cff": "cff-version: 1.2.0\nversion: 1.2.3\n",
        "pyproject.toml": f'[tool.hatch.metadata.hooks.custom]\nrepository = "{ADDRESS}"\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_a_tree_that_agrees_can_be_released(tree):
    assert load("releasable").problems("v1.2.3", ADDRESS, tree) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("fastrms/__init__.py", "1.2.3", "1.2.4", "the tag is v1.2.3, and fastrms.__version__ is 1.2.4"),
        ("docs/changelog.md", " - 2027-01-31", "", "docs/changelog.md has no heading '## 1.2.3 - YYYY-MM-DD'"),
        (".github/CITATION.cff", "1.2.3", "1.2.2", ".github/CITATION.cff has another version than 1.2.3"),
        ("pyproject.toml", ADDRESS, "", f"pyproject.toml has the repository '', and this one is {ADDRESS!r}"),
    ],
)
def test_a_tree_that_does_not_agree_cannot(tree, name, old, new, problem):
    path = tree / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    assert problem in load("releasable").problems("v1.2.3", ADDRESS, tree)
