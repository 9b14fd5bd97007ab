"""The built-in judges, case by case, and none of them raises on any text."""

from __future__ import annotations

import random
import threading

import pytest

from asyncgrpo.data.tasks import KINDS, TaskSource
from asyncgrpo.errors import RewardError
from asyncgrpo.rewards.answers import extract_tag, numbers
from asyncgrpo.rewards.builtin import BUILTINS, task
from asyncgrpo.rewards.finding import find
from asyncgrpo.settings.data import TaskSettings
from asyncgrpo.settings.reward import RewardFunction

TASKS = TaskSource(TaskSettings(kinds=dict.fromkeys(KINDS, 1.0)), 0, 318).held_out()


def judge(use: str, text: str, answer: object = None, **options: object) -> float:
    """One score, with options checked as those of a config file."""
    function = find(RewardFunction(use=use, options=options))
    arguments = {"completion": text, "answer": answer}
    known = {name: value for name, value in arguments.items() if name in function.parameters}
    return function.call(**known, **function.options)


@pytest.mark.parametrize(
    ("kind", "answer", "text", "right"),
    [
        ("add", "7", "7", True),
        ("add", "7", " 7\n", True),
        ("add", "7", "3 + 4 = 7", True),
        ("add", "7", "The answer is 7.", True),
        ("add", "7", "7 + 0 = 8", False),
        ("add", "7", "3 + 4 =", False),
        ("add", "7", "17", False),
        ("add", "7", "7.5", False),
        ("add", "7", "8\n7", False),
        ("add", "7", "", False),
        ("add", "7", "```\n7\n```", True),
        ("add", "7", "```python\n7\n```", True),
        ("add", "7", "```7```", True),
        ("add", "7", "```\n```", False),
        ("add", "72", "７２", True),
        ("sub", "-1", "-1", True),
        ("sub", "-1", "\N{MINUS SIGN}1", True),
        ("sub", "-1", "1", False),
        ("sub", "3", "10-3", True),
        ("check", "2", "3 0 2", True),
        ("check", "2", "2 0 3", False),
        ("sort", "1 2 3", "1 2 3", True),
        ("sort", "1 2 3", "1, 2, 3", True),
        ("sort", "100 200", "100,200", True),
        ("sort", "1 2 3", "3 1 2", False),
        ("sort", "1 2 3", "1 2 3 4", False),
        ("palindrome", "YES", "yes.", True),
        ("palindrome", "NO", "UNKNOWN", False),
        ("palindrome", "YES", "YES NO", False),
        ("palindrome", "NO", "No", True),
        ("reverse", "cba", "cba", True),
        ("reverse", "cba", "'cba'", True),
        ("reverse", "cba", "''cba''", False),
        ("reverse", "cba", "CBA", False),
        ("expression", "ABC", '"ABC"', True),
        ("expression", "ABC", "abc", False),
        ("expression", "3", "len = 3", True),
    ],
)
def test_the_task_judge_takes_the_last_number_whole_words_and_bare_text(kind, answer, text, right):
    assert task(text, answer, kind) == (1.0 if right else -1.0)


def test_every_truth_scores_right_and_another_text_wrong():
    scores = [task(str(p.answer), str(p.answer), p.columns["kind"]) for p in TASKS]
    assert scores == [1.0] * len(TASKS)
    swapped = [task("zz", str(p.answer), p.columns["kind"]) for p in TASKS]
    assert swapped == [-1.0] * len(TASKS)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so #### 72", 1.0, 1.0),
        ("####72", 1.0, 1.0),
        ("#### 72.0", 1.0, 1.0),
        ("#### $72.", 1.0, 1.0),
        ("#### **72** apples in 3 boxes", 1.0, 1.0),
        ("#### 24 * 3 = 72", 1.0, 1.0),
        ("#### ７２", 1.0, 1.0),
        ("```\n#### 72\n```", 1.0, 1.0),
        ("#### 72\nbut maybe 8", 1.0, 1.0),
        ("#### 3\n#### 72", 1.0, 1.0),
        ("#### 72\n#### 3", 0.2, 0.2),
        ("#### the answer is 72", 0.0, 1.0),
        ("48 + 24 makes 72", 0.0, 1.0),
        ("24 * 3 = 72", 0.0, 1.0),
        ("72 #### none", 0.0, 0.0),
        ("#### 172", 0.2, 0.2),
        ("#### -72", 0.2, 0.2),
        ("seven", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_gsm8k_compares_the_final_number_and_scores_the_format_apart(text, strict, flexible):
    assert judge("gsm8k", text, "24 + 48 #### 72", format_score=0.2) == strict
    assert judge("gsm8k", text, "72", format_score=0.2, extract="flexible") == flexible


@pytest.mark.parametrize("answer", [72, 72.0, "72", "72.0", " 72 ", "$72", "48 + 24 #### 72"])
@pytest.mark.parametrize("use", ["gsm8k", "integer", "math"])
def test_a_truth_may_be_a_number_or_text(use, answer):
    assert judge(use, "#### 72", answer) == 1.0
    assert judge(use, "#### 73", answer) == 0.0


@pytest.mark.parametrize("text", ["#### 1,234", "#### 1234", "#### $1,234.00"])
@pytest.mark.parametrize("answer", ["1,234", "1234", 1234])
@pytest.mark.parametrize("use", ["gsm8k", "integer", "math"])
def test_thousands_commas_may_stand_on_either_side(use, text, answer):
    assert judge(use, text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"\boxed{72}", "72", True),
        (r"so $\frac{1}{2}$", "0.5", True),
        ("1/2", r"\frac12", True),
        ("3 + 4 = 7", "7", True),
        ("3 + 4 = 7", "3", False),
        ("$3 + 4 = 7$", "7", True),
        ("```\n7\n```", "7", True),
        ("1,234", "1234", True),
        ("$72.", "72", True),
        ("-3.50", "-3.5", True),
        ("-3.50", "3.5", False),
        ("７２", "72", True),
        (r"$\sqrt{8}$", r"2\sqrt{2}", True),
        ("$(x+1)^2$", "x^2+2x+1", True),
        (r"$\{1,2\}$", r"\{2,1\}", True),
        ("50%", "0.5", True),
        (r"\boxed{7} or \boxed{8}", "7", False),
        ("blue", "7", False),
        ("", "7", False),
    ],
)
def test_math_compares_expressions_by_value(text, answer, right):
    assert judge("math", text, answer) == float(right)


def test_math_gives_the_format_score_to_another_expression_only():
    assert judge("math", r"\boxed{8}", "7", format_score=0.1) == 0.1
    assert judge("math", "no idea", "7", format_score=0.1) == 0.0


def test_math_works_in_threads_too():
    scores: list[float] = []
    thread = threading.Thread(target=lambda: scores.append(judge("math", "1/2", "0.5")))
    thread.start()
    thread.join(30)
    assert scores == [1.0]


def test_math_gives_up_on_a_tower_of_powers():
    assert judge("math", "$9^{9^{9^{9}}}$", "7", timeout_seconds=1) == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<answer>72</answer>", 1.0),
        ("thinking\n<answer>\n72\n</answer>\n", 1.0),
        ("<answer>```\n72\n```</answer>", 1.0),
        ("<answer>$72.</answer>", 1.0),
        ("<answer>72.0</answer>", 1.0),
        ("<answer>７２</answer>", 1.0),
        ("<answer>70 + 2 = 72</answer>", 1.0),
        ("<answer>1</answer><answer>72</answer>", 1.0),
        ("<answer>72</answer><answer>1</answer>", 0.1),
        ("<answer>172</answer>", 0.1),
        ("<answer>72 or 73</answer>", 0.1),
        ("<answer></answer>", 0.1),
        ("<answer>72", 0.0),
        ("72</answer>", 0.0),
        ("</answer>72<answer>", 0.0),
        ("<Answer>72</Answer>", 0.0),
        ("72", 0.0),
        ("", 0.0),
    ],
)
def test_tag_judges_what_the_last_closed_tag_holds(text, score):
    assert judge("tag", text, "72", format_score=0.1) == score


def test_the_tag_is_an_option_and_its_content_may_be_words():
    assert judge("tag", "<solution> blue\n</solution>", "blue", tag="solution") == 1.0
    assert judge("tag", "<answer>blue</answer>", "blue", tag="solution") == 0.0
    assert extract_tag("<a>1\n2</a>", "a") == "1\n2"
    assert extract_tag("<a>1", "a") is None


def test_many_open_tags_take_no_more_than_linear_time():
    assert judge("tag", "<answer>" * 100_000, "72") == 0.0


THINKING = r"^<think>.*?</think>\s*<answer>.*?</answer>$"


@pytest.mark.parametrize(
    ("pattern", "text", "score"),
    [
        (THINKING, "<think>a</think><answer>b</answer>", 1.0),
        (THINKING, "<think>a\nb</think>\n<answer>\nb\n</answer>", 1.0),
        (THINKING, "  <think>a</think> <answer>b</answer>\n", 1.0),
        (THINKING, "<think></think><answer></answer>", 1.0),
        (THINKING, "<think>a</think>", 0.0),
        (THINKING, "<answer>b</answer><think>a</think>", 0.0),
        (THINKING, "x <think>a</think><answer>b</answer>", 0.0),
        (THINKING, "<think>a</think><answer>b</answer> x", 0.0),
        (THINKING, "", 0.0),
        (r"####\s*-?\d+$", "so #### 7", 1.0),
        (r"####\s*-?\d+$", "#### 7 apples", 0.0),
        (r"####\s*-?\d+$", "#### 7\n", 1.0),
        (r"\\boxed\{", r"\boxed{7}", 1.0),
        (r"\\boxed\{", "boxed{7}", 0.0),
        (r"(?i)final answer", "Final Answer: 7", 1.0),
        (r"^[^0-9]*$", "no digit", 1.0),
        (r"^[^0-9]*$", "1 digit", 0.0),
    ],
)
def test_format_searches_a_regular_expression_over_lines(pattern, text, score):
    assert judge("format", text, pattern=pattern) == score


@pytest.mark.parametrize(
    ("text", "options", "score"),
    [
        ("", {"max_length": 5}, 1.0),
        ("12345", {"max_length": 5}, 1.0),
        ("123456", {"max_length": 5}, 0.0),
        ("", {"max_length": 0}, 1.0),
        ("x", {"max_length": 0}, 0.0),
        ("", {"min_length": 1, "max_length": 5}, 0.0),
        ("x", {"min_length": 1, "max_length": 5}, 1.0),
        ("ü", {"max_length": 1}, 1.0),
        ("７２", {"max_length": 2}, 1.0),
        (" \n ", {"min_length": 3, "max_length": 3}, 1.0),
        ("two words", {"max_length": 2, "unit": "words"}, 1.0),
        ("now three words", {"max_length": 2, "unit": "words"}, 0.0),
        ("  ", {"max_length": 0, "unit": "words"}, 1.0),
        ("a\nb\tc", {"min_length": 3, "max_length": 3, "unit": "words"}, 1.0),
        ("x" * 10_000, {"max_length": 9_999}, 0.0),
    ],
)
def test_length_scores_what_is_within_its_limits(text, options, score):
    assert judge("length", text, **options) == score


def test_the_length_penalty_grows_up_to_two_hundred_characters():
    sizes = (0, 100, 200, 999)
    assert [judge("length_penalty", "x" * n) for n in sizes] == [0.0, -0.2, -0.4, -0.4]
    assert judge("length_penalty", "xxx", per_character=1, max_characters=2) == -2


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("7", "7", 1.0),
        (" 7\n", "7", 1.0),
        ("7", " 7 ", 1.0),
        ("7", 7, 1.0),
        ("7.", "7", 0.0),
        ("", "7", 0.0),
        ("Blue", "blue", 0.0),
        ("blue", "blue", 1.0),
        ("blue sky", "blue", 0.0),
        ("```\nblue\n```", "blue", 1.0),
        ("```text\nblue\n```", "blue", 1.0),
        ("```blue```", "blue", 1.0),
        ("```\nblue", "blue", 1.0),
        ("a\nb", "a\nb", 1.0),
        ("７", "7", 0.0),
        ("是", "是", 1.0),
        ("不是", "是", 0.0),
    ],
)
def test_exact_ignores_outer_white_space_and_a_code_fence_only(text, answer, score):
    assert judge("exact", text, answer) == score


@pytest.mark.parametrize(
    ("text", "answer", "loose", "strict"),
    [
        ("7", "7", 1.0, 1.0),
        ("7.0", "7", 1.0, 1.0),
        ("The answer is 7.", "7", 1.0, 1.0),
        ("$7.", "7", 1.0, 1.0),
        ("```\n7\n```", "7", 1.0, 1.0),
        ("３", "3", 1.0, 1.0),
        ("-3", "-3", 1.0, 1.0),
        ("\N{MINUS SIGN}3", "-3", 1.0, 1.0),
        ("-$1,234", "-1234", 1.0, 1.0),
        ("3 + 4 = 7", "7", 1.0, 0.0),
        ("3 + 4 = 7", "3", 0.0, 0.0),
        ("7 or 8", "7", 0.0, 0.0),
        ("7.5", "7", 0.0, 0.0),
        ("17", "7", 0.0, 0.0),
        ("3", "-3", 0.0, 0.0),
        ("9007199254740993", "9007199254740992", 0.0, 0.0),
        ("9" * 10_000, "9", 0.0, 0.0),
        ("1e999", "1e998", 0.0, 0.0),
        ("seven", "7", 0.0, 0.0),
        ("", "7", 0.0, 0.0),
    ],
)
def test_integer_takes_the_last_number_or_strictly_the_only_one(text, answer, loose, strict):
    assert judge("integer", text, answer) == loose
    assert judge("integer", text, answer, strict=True) == strict


@pytest.mark.parametrize(
    ("choices", "text", "answer", "score"),
    [
        ("YES NO", "YES", "YES", 1.0),
        ("YES NO", "yes.", "YES", 1.0),
        ("YES NO", "**No**", "NO", 1.0),
        ("YES NO", "UNKNOWN", "NO", 0.0),
        ("YES NO", "NOT sure", "NO", 0.0),
        ("YES NO", "yes and no", "YES", 0.0),
        ("YES NO", "```\nNO\n```", "NO", 1.0),
        ("YES NO", "ＮＯ", "NO", 1.0),
        ("YES NO", "", "NO", 0.0),
        ("YES NO MAYBE", "Maybe", "MAYBE", 1.0),
        ("A B C", "The answer is B, a good one", "B", 1.0),
        ("A B C", "(A)", "A", 1.0),
        ("A B C", "a", "A", 0.0),
        ("A B C", "A or B", "A", 0.0),
        ("A B C", "AB", "A", 0.0),
        ("A B C", "C C C", "C", 1.0),
    ],
)
def test_choice_wants_exactly_one_choice_as_a_whole_word(choices, text, answer, score):
    assert judge("choice", text, answer, choices=choices.split()) == score


@pytest.mark.parametrize(
    ("text", "answer", "options", "score"),
    [
        ("7", "7", {}, 1.0),
        ("7.0", "7", {}, 1.0),
        ('"7"', "7", {}, 1.0),
        ('"blue"', "blue", {}, 1.0),
        ("blue", "blue", {}, 0.0),
        ("```json\n7\n```", "7", {}, 1.0),
        ('{"b": 1, "a": [2]}', '{"a": [2], "b": 1}', {}, 1.0),
        ('{"a": [2]}', '{"a": [3]}', {}, 0.1),
        ('{"answer": 7}', "7", {"key": "answer"}, 1.0),
        ('{"answer": "$7."}', "7", {"key": "answer"}, 1.0),
        ('{"answer": 8}', "7", {"key": "answer"}, 0.1),
        ('{"result": 7}', "7", {"key": "answer"}, 0.0),
        ("[7]", "7", {"key": "answer"}, 0.0),
        ("true", "1", {}, 0.1),
        ("true", "true", {}, 1.0),
        ("null", "7", {}, 0.1),
        ("NaN", "NaN", {}, 0.0),
        ('{"answer": 7', "7", {"key": "answer"}, 0.0),
        ("[" * 100_000, "7", {}, 0.0),
        ("9" * 5000, "7", {}, 0.0),
        ("", "7", {}, 0.0),
    ],
)
def test_json_judges_a_value_or_one_entry(text, answer, options, score):
    assert judge("json", text, answer, format_score=0.1, **options) == score


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1,234 and $72. and -3.50", ["1234", "72", "-3.50"]),
        ("-$5 at 10-3 or .5", ["-5", "10", "3", "0.5"]),
        ("1,23 1,2345 12,345,678", ["1", "23", "1", "2345", "12345678"]),
        ("1e3 2e 3.4.5", ["1000", "2", "3.4"]),
    ],
)
def test_numbers_are_found_whole(text, found):
    assert list(map(float, numbers(text))) == list(map(float, found))


@pytest.mark.parametrize("use", ["gsm8k", "integer", "exact", "tag", "math", "json"])
def test_a_record_without_an_answer_is_an_error_whatever_the_text(use):
    with pytest.raises(ValueError, match="the record has no answer; add an answer column"):
        judge(use, "")


@pytest.mark.parametrize(
    ("use", "answer", "options", "said"),
    [
        ("gsm8k", "blue", {}, "'blue' holds no number"),
        ("integer", "", {}, "holds no number"),
        ("choice", "PERHAPS", {"choices": ["YES", "NO"]}, "'PERHAPS' is none of the choices"),
        ("math", "", {}, "is no expression"),
    ],
)
def test_a_truth_that_the_judge_cannot_use_is_an_error(use, answer, options, said):
    with pytest.raises(ValueError, match=said):
        judge(use, "7", answer, **options)


@pytest.mark.parametrize(
    ("use", "options", "said"),
    [
        ("gsm8k", {"extrakt": "strict"}, r"no option 'extrakt'; did you mean 'extract'\?"),
        ("gsm8k", {"extract": "loose"}, r"options.extract='loose' is not allowed: .*'flexible'"),
        ("gsm8k", {"score": "high"}, "options.score='high' is not allowed: .*number"),
        ("gsm8k", {"answer": "7"}, "no option 'answer'"),
        ("choice", {}, "options.choices is not allowed: Field required"),
        ("choice", {"choices": ["YES"]}, "at least 2 items"),
        ("format", {"pattern": "("}, "valid regular expression"),
        ("tag", {"tag": "<answer>"}, r"options.tag='<answer>'"),
        ("http", {"url": "localhost:1"}, "options.url='localhost:1' .*URL scheme should be"),
        ("http", {"url": "http://x", "retries": -1}, "options.retries=-1 .* or equal to 0"),
    ],
)
def test_wrong_options_are_refused_when_the_judge_is_loaded(use, options, said):
    with pytest.raises(RewardError, match=said):
        find(RewardFunction(use=use, options=options))


WORDS = (
    '<answer> </answer> #### ``` \\boxed{ } { "answer": [ ] $ \\frac = - − + 1,234 72 .5 １ ٣ '
    "e9 NO UNKNOWN YES é 是 ％ \" ' \\ ( ) % 𝟜"
)
PIECES = (*WORDS.split(), "```json\n", " ", "\n", "\r", "\x00", "\ud800")
FUZZED = {
    "gsm8k": {"format_score": 0.1},
    "tag": {"format_score": 0.1},
    "format": {"pattern": THINKING},
    "length": {"max_length": 20},
    "length_penalty": {},
    "exact": {},
    "integer": {},
    "choice": {"choices": ["YES", "NO"]},
    "json": {"key": "answer", "format_score": 0.1},
    "math": {"timeout_seconds": 30},
}


def test_no_judge_raises_on_thousands_of_texts_and_scores_stay_bounded():
    chance = random.Random(0)
    texts = ["".join(chance.choices(PIECES, k=chance.randint(0, 12))) for _ in range(2_500)]
    texts += ["".join(map(chr, chance.choices(range(0xFFFF), k=20))) for _ in range(200)]
    assert {*FUZZED, "task", "http"} == set(BUILTINS)
    for use, options in FUZZED.items():
        function = find(RewardFunction(use=use, options=options))
        truth = "NO" if use == "choice" else "72"
        known = {"answer": truth} if "answer" in function.parameters else {}
        for text in texts:
            score = function.call(completion=text, **known, **function.options)
            assert -0.4 <= score <= 1.0, (use, text)
    for text in texts:
        prompt = chance.choice(TASKS)
        assert task(text, str(prompt.answer), prompt.columns["kind"]) in (-1.0, 1.0)
