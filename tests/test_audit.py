"""README's audit tables: what they name exists, no equation is missing, no difference from a paper is unexplained."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

# Numbered equations of each paper.
EQUATIONS = {
    "srdl": 16,  # 1, 2 in Sec. 3.1; 3 to 6 in 3.2; 7 to 10 in 3.3; 11 to 13 in 3.4; the metrics 14 to 16 in 4.1
    "sadcl": 0,  # the poster numbers none
    "energy_roi": 8,  # 1 in Sec. 3.1; 2 in 3.2; 3, 4 in 3.4; 5, 6 in 3.5; 7, 8 in supplement A
    "oass": 1,  # in Sec. 2.1
}
README = Path("README.md").read_text(encoding="utf-8")


def equations(text):
    """The numbers in "Eq. 7", "Eqs. 1, 2, 5", "Eq. 4 and 5", "Eqs. 7 to 10"."""
    found = set()
    for tag in re.findall(r"\bEqs?\.\s+(\d+(?:(?:, | and | to )\d+)*)", text):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", tag):
            found |= set(range(int(first), int(last or first) + 1))
    return found


def differences(text):
    """The numbers in "D1", "(D2, D3)"."""
    return {int(n) for n in re.findall(r"\bD(\d+)\b", text)}


def audit(script):
    """Rows [equation or table, function, test] of the script's table."""
    section = README.split("\n## Audit\n")[1].split("\n## ")[0]
    table = section.split(f"([{script}.py]({script}.py))\n\n")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def header_and_code(script):
    header = importlib.import_module(script).__doc__
    return header, Path(f"{script}.py").read_text(encoding="utf-8").replace(header, "")


def named(cell, pattern):
    """All parts of a cell that reads `a`, `b`, ...; nothing else may stand in it."""
    found = [re.fullmatch(pattern, part) for part in cell.split(", ")]
    assert all(found), cell
    return [match.groups() for match in found]


def resolve(module, name):
    for part in name.split("."):
        module = getattr(module, part)
    return module


def functions(cell):
    return [resolve(importlib.import_module(file), name) for file, name in named(cell, r"`(\w+)\.py: ([\w.]+)`")]


@pytest.mark.parametrize("script", EQUATIONS)
def test_functions_and_tests_exist_and_functions_carry_their_equations_number(script):
    rows = audit(script)
    assert len(rows) > 10
    for title, function, test in rows:
        found = functions(function)
        assert all(callable(f) for f in found)
        assert equations(title) <= equations("\n".join(map(inspect.getsource, found))), title
        for file, name in named(test, r"`(test_\w+\.py)::(test_\w+)`"):
            assert f"\ndef {name}(" in Path("tests", file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize(("script", "count"), EQUATIONS.items())
def test_every_equation_is_in_header_and_audit(script, count):
    header, code = header_and_code(script)
    every = set(range(1, count + 1))
    assert equations("\n".join(title for title, _, _ in audit(script))) == every
    assert equations(header[: header.index("\nDifferences from the paper")]) == every  # its table
    assert equations(header) | equations(code) == every


@pytest.mark.parametrize("script", EQUATIONS)
def test_what_a_headers_table_names_is_in_the_audit(script):
    header, module, shown = header_and_code(script)[0], importlib.import_module(script), []
    for cell in re.findall(r"^\| .* \| (.*) \|$", header, re.MULTILINE):
        for name in re.findall(r"[A-Za-z_][\w.]*\w", cell):
            try:
                shown.append(resolve(module, name))
            except AttributeError:
                continue  # a word
    audited = [f for _, cell, _ in audit(script) for f in functions(cell)]
    assert len(shown) > 8 and all(any(f is g for g in audited) for f in shown if callable(f))


@pytest.mark.parametrize("script", EQUATIONS)
def test_every_difference_is_listed_tagged_in_the_code_and_in_the_audit(script):
    header, code = header_and_code(script)
    listed = [int(n) for n in re.findall(r"^D(\d+)  ", header, re.MULTILINE)]
    assert listed == list(range(1, len(listed) + 1)) and listed
    assert differences(code) == set(listed)
    assert differences("\n".join(title for title, _, _ in audit(script))) == set(listed)
    assert {int(n) for n in re.findall(rf"D(\d+) in \[{script}\.py\]", README)} <= set(listed)
