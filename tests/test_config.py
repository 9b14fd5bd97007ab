"""Settings: what is wrong is named with its value, what is allowed, and what to change."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from asyncgrpo.config import Config, from_mapping, load_config
from asyncgrpo.errors import ConfigError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))

WRONG = {
    "learner.lrr=1": ["unknown setting learner.lrr", "did you mean learner.lr?"],
    "buffer.lr=1": ["unknown setting buffer.lr", "did you mean learner.lr?"],
    "leaner.lr=1": ["unknown setting leaner", "did you mean learner?"],
    "data.tasks.modulos=3": ["unknown setting data.tasks.modulos", "data.tasks.modulus?"],
    "reward.functions=[{use='task', wieght=2}]": ["wieght", "did you mean", "weight?"],
    "learner.lr=fast": ["learner.lr='fast'", "valid number"],
    "learner.lr=inf": ["learner.lr=inf", "finite number"],
    "algo.entropy_coef=inf": ["algo.entropy_coef=inf", "finite number"],
    "algo.correction_cap=nan": ["algo.correction_cap=nan", "greater than 0"],
    "reward.correct_above=nan": ["reward.correct_above=nan", "finite number"],
    "reward.functions=[{use='task', weight=nan}]": ["functions.0.weight=nan", "finite number"],
    "learner.betas=[0.9, 1]": ["learner.betas.1=1", "less than 1"],
    "data.tasks.long_tail=1000": ["long_tail=1000", "less than or equal to 5"],
    "data.train=[{path='a', sample_ratio=1e308}]": ["sample_ratio=1e+308", "equal to 1000"],
    "data.train=''": ["data.train=''", "at least 1 character"],
    "launch.actors=1000000": ["launch.actors=1000000", "less than or equal to 1024"],
    "data.train={path='a'}": ["data.train=", "a list of tables"],
    "reward.functions=[3]": ["reward.functions.0=3"],
    "algo.vespo.positive=3": ["algo.vespo.positive=3", "a list ("],
    "launch.actors=0": ["launch.actors=0", "greater than or equal to 1"],
    "launch.actors=two": ["launch.actors='two'", "valid integer"],
    "buffer.max_staleness=-1": ["buffer.max_staleness=-1", "greater than or equal to 0"],
    "actor.engine=sglang": ["actor.engine='sglang'", "'vllm' or 'toy'"],
    "algo.group_size=1": ["algo.group_size=1", "must be >= 2", "set algo.group_size"],
    "buffer.completions_per_step=30": ["completions_per_step=30", "group_size=8", "24 or 32"],
    "weights.publish_every=6": ["publish_every=6", "max_staleness + 1 = 5", "deadlock"],
    "weights={only_changed=true, transport='disk'}": ["only_changed=true", "set another transport"],
    "actor.sleep=true": ["actor.sleep=True needs launch.gpus >= 1 (now 0)", "share_gpus = true"],
    "launch.learners=17": ["groups_per_step=16", "launch.learners=17", "at least one group"],
    "learner.max_tokens_per_microbatch=20": ["=20", "256 + 16 = 272"],
    "data.tasks.sequence_min=9": ["sequence_min=9", "sequence_max=6"],
    "reward.functions=[{use='task'}, {use='task'}]": ["two are called 'task'", "`name`"],
    "reward.routes={a={use='task', wieght=2}}": ["wieght", "did you mean", "weight?"],
    "reward.routes={a={task='much'}}": ["reward.routes.a.0.weight='much'", "valid number"],
    "reward.routes={a=[]}": ["reward.routes.a=[]", "at least 1 item"],
    "reward.on_error=value": ["on_error='value' with error_value=None", "set both"],
    "reward.error_value=-1": ["on_error='drop_group' with error_value=-1", "or neither"],
    "reward.on_error=ignore": ["reward.on_error='ignore'", "'drop_group', 'zero' or 'value'"],
    "reward.max_error_rate=2": ["reward.max_error_rate=2", "less than or equal to 1"],
    "eval.evry=3": ["unknown setting eval.evry", "did you mean eval.every?"],
    "eval.every=-1": ["eval.every=-1", "greater than or equal to 0"],
    "eval=3": ["eval=3 is not allowed"],
    "eval=[{num_sample=4}]": ["unknown setting eval.0.num_sample", "eval.0.num_samples?"],
    "eval.k=0": ["eval.k.0=0", "greater than or equal to 1"],
    "eval.name='a/b'": ["eval.name='a/b'", "match pattern"],
    "eval.num_samples=4": ["num_samples=4 with sampling.temperature=0", "all the same"],
    "eval={k=[1,4], num_samples=2, sampling={temperature=1}}": ["k=4 must be <= num_samples=2"],
    "eval=[{data='a'}, {data='b'}]": ["two blocks are called 'held-out'", "another `name`"],
    "eval.reward.functions=[{use='task'}, {use='task'}]": ["two are called 'task'"],
    "eval.reward.workers=2": ["unknown setting eval.reward.workers"],
    "launch.metrics_port=99999": ["launch.metrics_port=99999", "65535"],
    "launch.host=localhost": ["launch.host: 'localhost'", "IPv4 address", "use 127.0.0.1"],
    "launch.host=0.0.0.0": ["launch.host: '0.0.0.0'", "that the others reach"],
    "observe.metrics_host=::": ["observe.metrics_host: '::'", "IPv4 address"],
    "launch={host='10.0.0.1', encrypt=false}": ["encrypt=false with host=10.0.0.1", "--insecure"],
    "learner.betas=[0.9]": ["learner.betas=[0.9] is not allowed: it has too few values"],
    "learner.lora.targets=foo": ["learner.lora.targets='foo' is not allowed: Input should be a"],
    "launch.encrypt=maybe": ["launch.encrypt='maybe'", "'auto', True or False"],
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_settings_are_refused_with_value_limit_and_remedy(override):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    for part in WRONG[override]:
        assert part in str(caught.value)


ONE_GPU = {"gpus": 1, "share_gpus": True}
ON_CPU = {"kl_coef": 1e-3, "reference": {"on_cpu": True}}
HALF = {"fused_head": True, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("rooms", "message"),
    [
        (
            {"actor": {"sleep": True}, "launch": {"gpus": 2}},
            r"gpus >= 1 \(now 2\) and .*share_gpus",
        ),
        (
            {"actor": {"sleep": True, "engine": "toy"}, "weights": {"publish_every": 2}},
            r"actor.sleep=True needs weights.publish_every = 1 \(now 2;",
        ),
        ({"learner": HALF}, "learner.fused_head=True needs CUDA, but launch.gpus=0"),
        ({"algo": ON_CPU}, "algo.reference.on_cpu=True needs CUDA, but launch.gpus=0"),
        (
            {"algo": ON_CPU, "learner": {"lora": {}}, "launch": ONE_GPU},
            r"on_cpu=True needs algo.reference.path \(without it",
        ),
        ({"learner": {"fused_head": True}, "launch": ONE_GPU}, r"'bfloat16' \(now 'float32'\)"),
        ({"learner": {**HALF, "float32_head": True}, "launch": ONE_GPU}, "float32_head = false"),
    ],
)
def test_what_an_engine_that_sleeps_and_a_fused_output_layer_need_is_said(rooms, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(rooms)


def test_an_engine_may_sleep_on_a_shared_gpu_and_a_toy_anywhere():
    assert from_mapping({"actor": {"sleep": True}, "launch": ONE_GPU}).actor.sleep
    assert from_mapping({"actor": {"sleep": True, "engine": "toy"}}).actor.sleep
    assert from_mapping({"learner": HALF, "launch": ONE_GPU}).learner.fused_head


@pytest.mark.parametrize("text", ["learner.lr", "=3", ""])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match=r"must look like room.key=value"):
        load_config(None, [text])


def test_overrides_are_toml_values_and_bare_words_are_text():
    config = load_config(None, ["learner.lr=1e-4", "actor.engine=toy", "learner.betas=[0.8, 0.9]"])
    assert (config.learner.lr, config.actor.engine, config.learner.betas) == (
        1e-4,
        "toy",
        (0.8, 0.9),
    )


def test_a_batch_may_be_given_in_completions():
    config = load_config(None, ["buffer.completions_per_step=64", "algo.group_size=4"])
    assert config.buffer.groups_per_step == 16


def test_a_batch_has_one_unit():
    config = load_config(None, ["buffer.tokens_per_step=65536", "algo.minibatches=4"])
    assert (config.buffer.tokens_per_step, config.min_groups) == (65536, 8)
    for other in ("buffer.groups_per_step=4", "buffer.tokens_per_step=100"):
        with pytest.raises(ConfigError, match=r"completions_per_step=64 is 8 groups .* keep one"):
            load_config(None, ["buffer.completions_per_step=64", other])


def test_routes_take_the_place_of_the_default_functions_but_not_of_given_ones():
    routes = "reward.routes={gsm={a=0.7, b=0.3}}"
    alone = load_config(None, [routes]).reward
    assert alone.functions == ()
    assert [(f.use, f.weight) for f in alone.routes["gsm"]] == [("a", 0.7), ("b", 0.3)]
    both = load_config(None, [routes, "reward.functions=[{use='exact'}]"]).reward
    assert [f.use for f in both.functions] == ["exact"]
    assert from_mapping({"reward": alone.model_dump(mode="json")}).reward == alone


@pytest.mark.parametrize(
    ("launch", "encrypted"),
    [
        ({}, False),
        ({"encrypt": True}, True),
        ({"host": "127.0.0.2"}, False),
        ({"host": "10.0.0.1"}, True),
        ({"host": "10.0.0.1", "encrypt": True, "insecure": True}, True),
        ({"host": "10.0.0.1", "insecure": True}, False),
        ({"host": "10.0.0.1", "insecure": True, "encrypt": False}, False),
    ],
)
def test_off_loopback_a_run_is_encrypted_unless_told_otherwise_twice(launch, encrypted):
    assert from_mapping({"launch": launch}).launch.encrypted == encrypted


def test_a_missing_config_file_names_its_neighbours(tmp_path):
    (tmp_path / "mine.toml").write_text("")
    with pytest.raises(ConfigError, match=r"nine.toml does not exist; there are: .*mine.toml"):
        load_config(tmp_path / "nine.toml")


def test_broken_toml_is_refused_with_its_line(tmp_path):
    (tmp_path / "bad.toml").write_text("[learner]\nlr = \n")
    with pytest.raises(ConfigError, match="line 2"):
        load_config(tmp_path / "bad.toml")


def test_a_wrong_setting_is_named_with_the_file_that_has_it(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[learner]\nlrr = 1\n")
    for overrides, source in (
        ([], f"{file}: "),
        (["run.seed=1"], f"{file} with --set and options: "),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(file, overrides)
        assert str(caught.value).startswith(f"{source}unknown setting learner.lrr; did you mean")


def test_the_resolved_dump_gives_the_same_settings_again():
    config = load_config(None, ["buffer.completions_per_step=64", "learner.betas=[0.8, 0.9]"])
    assert from_mapping(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    assert isinstance(load_config(path), Config)


def test_there_are_shipped_configs():
    assert "tiny" in [path.stem for path in CONFIGS]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": [{"path": "a", "wieght": 1}]},
            r"data.train.0.wieght; did you mean .*0.weight",
        ),
        ({"train": [{"path": "a", "weight": 0}]}, r"data.train.0.weight=0 is not allowed"),
        ({"train": [{"path": "a", "sample_ratio": -1}]}, r"data.train.0.sample_ratio=-1 is not"),
        (
            {"train": [{"path": "a", "weight": 1}, {"path": "b"}]},
            r"are \[1.0, None\]; give",
        ),
        ({"train": []}, r"train=\[\] holds no table"),
        ({"train": 3}, r"data.train=3 is not allowed"),
        ({"template": {"sufix": "Go."}}, r"data.template.sufix; did you mean data.template.suffix"),
        ({"template": {"few_shot": [{"user": "a"}]}}, r"data.template.few_shot.0.assistant"),
        ({"overlong_prompt": "cut"}, r"overlong_prompt='cut' is not allowed.*'truncate_left'"),
    ],
)
def test_a_wrong_setting_of_a_table_or_template_is_named_with_its_place(data, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping({"data": data})


def test_tables_survive_the_resolved_dump():
    table = {"path": "a.jsonl", "weight": 2, "template": {"system": "你", "suffix": "Go."}}
    config = from_mapping({"data": {"train": [table]}})
    assert from_mapping(config.model_dump(mode="json")) == config
    assert config.data.train[0].template.suffix == "Go."


BLOCKS = """
[data]
eval = "held.jsonl"
[sampling]
max_completion_tokens = 64
[reward]
functions = ["gsm8k"]
workers = 3
[[eval]]
[[eval]]
name = "sampled"
data = "tasks"
num_prompts = 50
num_samples = 8
k = 8
sampling = { temperature = 0.6, max_completion_tokens = 128 }
reward = { functions = [{ use = "exact" }], correct_above = 0.5 }
"""


def test_evaluation_blocks_take_what_they_leave_out_from_other_rooms():
    config = from_mapping(tomllib.loads(BLOCKS.replace('["gsm8k"]', '[{ use = "gsm8k" }]')))
    plain, sampled = config.evals
    assert (plain.name, plain.data, plain.num_samples, plain.k) == ("held-out", "held.jsonl", 1, ())
    assert plain.sampling.temperature == 0
    assert (sampled.data, sampled.k) == ("tasks", (8,))
    assert config.num_held_out_tasks == 50
    assert config.max_sequence_tokens == 256 + 128
    names = {name: [f.use for f in reward.functions] for name, reward in config.rewards.items()}
    assert names == {"": ["gsm8k"], "held-out": ["gsm8k"], "sampled": ["exact"]}
    assert [r.correct_above for r in config.rewards.values()] == [0, 0, 0.5]
    assert {r.workers for r in config.rewards.values()} == {3}
    assert from_mapping(config.model_dump(mode="json")) == config


def test_one_eval_table_is_one_block_and_overrides_reach_it():
    config = load_config(
        None, ["eval.every=5", "eval.k=[1, 2]", "eval.num_samples=2", "eval.sampling.temperature=1"]
    )
    (block,) = config.evals
    assert (block.name, block.data, block.every, block.k) == ("held-out", "tasks", 5, (1, 2))


def test_an_override_reaches_a_table_of_a_list_by_its_place(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text('[[eval]]\n[[eval]]\nname = "b"\n')
    assert [b.every for b in load_config(path, ["eval.1.every=3"]).eval] == [10, 3]
    for override in ("eval.every=3", "eval.2.every=3", "eval.b.every=3"):
        with pytest.raises(ConfigError, match=r"eval is a list of 2 tables; write eval.0.every"):
            load_config(path, [override])
    with pytest.raises(ConfigError, match=r"evaluate_step=3 means eval.every, but eval is no"):
        load_config(path, ["evaluate_step=3"])


@pytest.mark.parametrize("nothing", ["none", ""])
def test_blocks_without_data_are_left_out_but_those_with_their_own_stay(nothing):
    assert load_config(None, [f"data.eval='{nothing}'"]).evals == ()
    own = load_config(None, [f"data.eval='{nothing}'", "eval=[{}, {name='a', data='tasks'}]"])
    assert [(block.name, block.data) for block in own.evals] == [("a", "tasks")]
    assert load_config(None, ["eval=[]"]).evals == ()


def test_reward_functions_may_be_names():
    for text in ("'task'", "['task']", "{use='task'}", "[{use='task'}]"):
        config = load_config(None, [f"reward.functions={text}"])
        assert [function.use for function in config.reward.functions] == ["task"]


def test_what_bounds_something_may_be_infinite():
    config = load_config(None, ["learner.max_grad_norm=inf", "algo.correction_cap=inf"])
    assert config.learner.max_grad_norm == config.algo.correction_cap == float("inf")


def test_an_engine_step_holds_a_token_of_each_sequence() -> None:
    """vLLM refuses to start otherwise; 2048 is its own default."""
    assert from_mapping({}).engine_tokens == 2048
    wide = from_mapping({"actor": {"concurrency": 128}, "algo": {"group_size": 32}})
    assert wide.engine_tokens == wide.engine_sequences == 128 * 32 + 64
