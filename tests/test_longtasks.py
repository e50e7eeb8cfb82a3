"""bench/longtasks.py: the loaders of LongBench v2 and LongGenBench."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.usefixtures("bench_modules")


def test_longbench_v2_loader(tmp_path):
    import longtasks

    item = {"_id": "a1", "domain": "x", "difficulty": "easy", "length": "short"}
    item |= {"question": "Why?", "context": "Because.", "answer": "C"}
    item |= {f"choice_{letter}": f"reason {letter}" for letter in "ABCD"}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([item, item | {"_id": "a2", "answer": "A"}]))
    first, second = longtasks.longbench_v2(path)
    assert (first.id, first.answer, second.answer) == ("a1", "C", "A")
    assert "Because." in first.prompt and "(D) reason D" in first.prompt
    assert first.score("**The correct answer is (C)**") == 1
    assert first.score("The correct answer is B") == first.score("C") == 0
    path.write_text(json.dumps([item | {"answer": "E"}]))
    with pytest.raises(ValueError, match="answer is 'E'"):
        longtasks.longbench_v2(path)
    path.write_text(json.dumps([{"_id": "a"}]))
    with pytest.raises(ValueError, match="lacks context, question"):
        longtasks.longbench_v2(path)


def test_longgenbench_loader(tmp_path):
    import longtasks

    item = {"prompt": "Write a diary.", "type": "Week", "prefix": "#*# Week 1:", "number": 4}
    item |= {"checks_once": {"2": "a birthday"}, "checks_range": {"2": "a trip", "3": "a trip"}}
    path = tmp_path / "Dataset_short.json"
    path.write_text(json.dumps([item | {"checks_periodic": {"4": "a class"}}]))
    (writing,) = longtasks.longgenbench(path)
    assert writing.checks == {2: ("a birthday", "a trip"), 3: ("a trip",), 4: ("a class",)}
    assert writing.completion_rate("rain #*# Week 2 (x): sun #*# Week 3: snow") == 0.75
    assert writing.completion_rate("#*# Week 2 #*# Week 2 #*# Week 9") == 0.5
