"""bench/ruler.py and quality_prompts.py: the tasks, their answers, prompts of one length."""

from __future__ import annotations

import re

import pytest
import torch
from words import Words

pytestmark = pytest.mark.usefixtures("bench_modules")


@pytest.mark.parametrize("length", [400, 1500])
def test_ruler_samples(length):
    import ruler

    words = Words()
    for task in ruler.TASKS:
        sample = ruler.make(task, words, length, seed=3)
        assert sample == ruler.make(task, words, length, seed=3)
        assert sample != ruler.make(task, words, length, seed=4)
        for question in sample.questions:
            text = sample.context + question.text + question.prefix
            assert length - 160 <= len(words(text).input_ids) <= length
            for answer in question.answers:
                assert answer in sample.context
            assert question.score(" and ".join(question.answers).upper()) == 1
            assert question.score("") == 0
            if len(question.answers) > 1:
                assert question.score(question.answers[0]) == 1 / len(question.answers)
    with pytest.raises(ValueError, match="task is 'other'"):
        ruler.make("other", words, length, 0)
    with pytest.raises(ValueError, match="too short"):
        ruler.make("vt", words, 50, 0)


def test_prompts_have_one_length(tmp_path):
    import quality_prompts as prompts
    import ruler

    words = Words()
    for task in ruler.TASKS:
        found = prompts.ruler_questions(task, words, 700, 4)
        assert {len(asked.ids) for asked in found.asked} == {700}
        assert len({asked.ids for asked in found.asked}) == 4
        # What is asked is about the context of that prompt: its question stands at the end.
        sample = ruler.make(task, words, 700 - len(words("\n").input_ids) - 4, 2)
        question = sample.questions[2 % len(sample.questions)]
        assert found.asked[2].answers == question.answers
        tail = words(question.text + "\n" + question.prefix).input_ids
        assert list(found.asked[2].ids[-len(tail) :]) == tail
        prompts.save(tmp_path, found)
        assert prompts.load(tmp_path, task, 700) == found
        part = found.part(1, 3)
        assert part.asked == found.asked[1:3] and part.first == 1
        assert part.part(1, 2).first == 2
    rows = torch.arange(12).view(2, 6)
    prompts.save_windows(tmp_path, "prose", rows)
    assert torch.equal(prompts.load_windows(tmp_path, "prose", 6), rows)
    with pytest.raises(ValueError, match="too short"):
        prompts.ruler_questions("cwe", words, 60, 1)


def test_ruler_answers_are_right():
    import ruler

    words = Words()
    for task in ("vt", "vt1"):
        sample = ruler.make(task, words, 2000, seed=0)
        assigned = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", sample.context))
        for question in sample.questions:
            value = re.search(r"value (\d+)", question.text).group(1)
            assert len(question.answers) == (5 if task == "vt" else 2)
            for name in question.answers:
                while name in assigned:
                    name = assigned[name]
                assert name == value
    for task, top in (("fwe", 3), ("fwe1", 1)):
        sample = ruler.make(task, words, 2000, seed=0)
        coded = sample.context.splitlines()[-1].split()
        counts = sorted((word for word in set(coded) if word != "..."), key=coded.count)
        assert set(counts[-top:]) == set(sample.questions[0].answers)
    for task, top in (("cwe", 10), ("cwe3", 3)):
        sample = ruler.make(task, words, 2000, seed=0)
        listed = re.findall(r"\d+\. (\w+)", sample.context)
        common = sorted(set(listed), key=listed.count)[-top:]
        assert set(common) == set(sample.questions[0].answers)
    for task in ("multikey", "multikey2"):
        sample = ruler.make(task, words, 2000, seed=0)
        for question in sample.questions:
            key = re.search(r"magic number for (.*) mentioned", question.text).group(1)
            assert f"magic numbers for {key} is: {question.answers[0]}." in sample.context


def test_score_needs_every_answer():
    from quality_runs import _all_in

    score = _all_in(("17", "Abc"))
    assert score("it is 17, ABC") == 1 and score("abc") == 0.5 and score("1 7") == 0
