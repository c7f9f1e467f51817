"""Prompts to responses."""

import datasets
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from hf_recontrol import ControlConfig, ReControlForCausalLM
from hf_recontrol.collection import sampling
from hf_recontrol.collection.rollouts import generate_rollouts, pad_batch, write_rollouts
from hf_recontrol.collection.sampling import RowSampler, response_seed
from hf_recontrol.collection.stop_strings import StopStrings, cut_response
from hf_recontrol.data.prompts import load_prompts
from hf_recontrol.data.rollouts import load_rollouts
from hf_recontrol.data.stage_folder import read_manifest
from hf_recontrol.modeling import generation

from .conftest import make_head
from .tiny_models import FAMILIES, tiny_model
from .tiny_tokenizer import byte_tokenizer, tiny_tokenizer

PROMPTS = ["w5 w6 w7", "w8", "w9 w10"]


@pytest.fixture
def model():
    model = tiny_model("llama", dtype=torch.float32)
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_prompt_order_and_samples_of_one_prompt_follow_each_other(model, tokenizer):
    rollouts = generate_rollouts(model, tokenizer, PROMPTS, num_samples=3, max_new_tokens=6, batch_size=2)
    assert [r.prompt for r in rollouts] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({tuple(r.completion_ids) for r in rollouts}) > 3, "samples of one prompt differ"


def test_prompts_may_come_as_everywhere_else(model, tokenizer, tmp_path, recontrol_warnings):
    write_rollouts(tmp_path / "one", model, tokenizer, load_prompts(PROMPTS), max_new_tokens=3)
    given = [*PROMPTS, ""]
    with pytest.raises(ValueError, match="row 3: the prompt is empty"):
        write_rollouts(tmp_path / "two", model, tokenizer, given, max_new_tokens=3)
    write_rollouts(tmp_path / "two", model, tokenizer, given, max_new_tokens=3, on_bad_rows="skip")
    assert load_rollouts(tmp_path / "two") == load_rollouts(tmp_path / "one")


def test_the_same_seed_gives_the_same_rollouts_and_leaves_the_global_generator_alone(model, tokenizer):
    before = torch.get_rng_state()
    first = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=6, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert first == generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=6, seed=3)
    assert first != generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=6, seed=4)


def test_greedy_rollouts_of_a_batch_are_those_of_single_prompts(model, tokenizer):
    together = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    alone = [generate_rollouts(model, tokenizer, [p], max_new_tokens=8, temperature=0.0)[0] for p in PROMPTS]
    assert [r.completion_ids for r in together] == [r.completion_ids for r in alone]
    assert [r.prompt_number for r in together] == [0, 1, 2]


def test_a_response_ends_with_the_token_that_ended_it_and_its_text_without(model, tokenizer):
    rollouts = generate_rollouts(model, tokenizer, PROMPTS, num_samples=40, max_new_tokens=12, temperature=2.0)
    finished = [r for r in rollouts if r.finished]
    assert finished and len(finished) < len(rollouts)
    for rollout in rollouts:
        assert rollout.finished == (2 in rollout.completion_ids)
        assert 2 not in rollout.completion_ids[:-1]
        words = rollout.completion_ids[:-1] if rollout.finished else rollout.completion_ids
        assert rollout.completion == tokenizer.decode(words, skip_special_tokens=True)
        assert rollout.finished or len(rollout.completion_ids) == 12


def test_a_stop_string_ends_the_turn_and_is_cut_from_text_and_tokens():
    model, tokenizer = tiny_model("llama", dtype=torch.float32, vocab_size=258), byte_tokenizer()
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}
    plain = generate_rollouts(model, tokenizer, ["abc"], **options)[0]
    # Bytes from the middle, so that the stop string is several tokens long; half a character could not be one.
    start, stop = next(
        (i, text)
        for i in range(1, 10)
        if "\ufffd" not in (text := tokenizer.decode(plain.completion_ids[i : i + 2])) and text in plain.completion
    )
    cut = generate_rollouts(model, tokenizer, ["abc"], stop_strings=[stop, "never"], **options)[0]
    assert cut.finished and not plain.finished
    assert cut.completion == plain.completion[: plain.completion.index(stop)]
    # The tokens of the stop string are what ended the turn, and what was drawn behind them is not kept.
    assert cut.completion_ids == plain.completion_ids[: start + 2]


def test_a_stop_string_does_not_begin_in_the_prompt():
    model, tokenizer = tiny_model("llama", dtype=torch.float32, vocab_size=258), byte_tokenizer()
    prompts = ["ab", "hello wor", "x"]
    for seed in range(20):
        options = {"max_new_tokens": 8, "seed": seed}
        plain = generate_rollouts(model, tokenizer, prompts, **options)
        stop = "x" + tokenizer.decode(plain[2].completion_ids[:1])
        # Half a character could not be one.
        if "\ufffd" not in stop:
            break
    assert "\ufffd" not in stop and not any(stop in rollout.completion for rollout in plain)
    assert generate_rollouts(model, tokenizer, prompts, stop_strings=[stop], **options) == plain


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"num_beams": 2}, {"do_sample": False}])
def test_rows_that_stop_early_hold_no_padding(settings):
    model, tokenizer = tiny_model("llama", dtype=torch.float32, vocab_size=258), byte_tokenizer()
    config = GenerationConfig(**{"do_sample": "temperature" in settings, "top_k": None} | settings)
    prompts = [chr(97 + i) * (1 + i % 5) for i in range(24)]
    plain = generate_rollouts(model, tokenizer, prompts, generation_config=config, max_new_tokens=8)
    stops = list({r.completion[2] for r in plain if len(r.completion) > 3 and r.completion[2] != "\ufffd"})[:3]
    found = generate_rollouts(
        model, tokenizer, prompts, generation_config=config, max_new_tokens=8, stop_strings=stops, batch_size=7
    )
    stopped = [r for r in found if r.finished]
    assert stopped and len(stopped) < len(found)
    for rollout in found:
        text = tokenizer.decode(rollout.completion_ids)
        assert rollout.finished == any(stop in text for stop in stops)
        assert not any(stop in tokenizer.decode(rollout.completion_ids[:-1]) for stop in stops)
        assert rollout.finished or len(rollout.completion_ids) == 8


def test_a_stop_string_is_seen_inside_many_tokens_at_once(tokenizer):
    """As drafts come."""
    ids = torch.tensor([[9, 9, 5, 9, *[7] * 30]])
    criterion = StopStrings(tokenizer, ["w9"], 2)
    assert [bool(criterion(ids[:, :length], None)) for length in (3, 34, 35)] == [False, True, False]


def test_a_stop_string_with_a_tokenizer_of_whole_words(model, tokenizer):
    plain = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8)
    row = next(i for i, rollout in enumerate(plain) if len(rollout.completion.split()) > 2)
    stop = plain[row].completion.split()[1]
    cut = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8, stop_strings=[stop])[row]
    assert cut.finished and tokenizer.decode(cut.completion_ids).endswith(stop)


def test_odd_defaults_of_the_base_do_not_bend_its_rollouts(model, tokenizer):
    plain = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8)
    odd = {"repetition_penalty": 1.9, "top_k": 2, "no_repeat_ngram_size": 1, "num_beams": 3, "typical_p": 0.5}
    odd |= {
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "stop_strings": ["w9"],
        "forced_eos_token_id": 9,
    }
    model.generation_config.update(**odd)
    assert generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8) == plain


def test_a_stop_string_that_is_a_special_token_or_follows_split_characters():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    letters = tokenizer("ab")["input_ids"]
    assert cut_response(tokenizer, [*letters, stop, 0, 0], [1], ["<stop>"]) == ("ab", [*letters, stop], True)
    ids = tokenizer("\U0001f44d!\n\nHuman: x")["input_ids"]
    assert cut_response(tokenizer, ids, [1], ["\n\nHuman:"]) == ("\U0001f44d!", ids[: 4 + 1 + 8], True)


def test_a_prompt_too_long_for_the_model_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="make 70 tokens, the model has room for 64"):
        generate_rollouts(model, tokenizer, ["w5 " * 10], max_new_tokens=60)


def test_rollouts_come_from_the_base_unless_control_is_asked_for(model, tokenizer):
    base = generate_rollouts(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0)
    control = ControlConfig(step_size=5.0, num_steps=10)
    controlled = ReControlForCausalLM.from_model(model, make_head(hidden_size=16), control)
    assert generate_rollouts(controlled, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0) == base
    assert (
        generate_rollouts(controlled, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.0, control=control) != base
    )


def test_no_prompts_and_a_prompt_without_tokens_are_errors(model, tokenizer):
    with pytest.raises(ValueError, match="No prompts"):
        generate_rollouts(model, tokenizer, [])
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        generate_rollouts(model, tokenizer, ["w5", ""])


def test_padding_sides():
    left = pad_batch([[1, 2], [3]], 9, "left", "cpu")
    right = pad_batch([[1, 2], [3]], 9, "right", "cpu")
    assert left["input_ids"].tolist() == [[1, 2], [9, 3]] and left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert right["input_ids"].tolist() == [[1, 2], [3, 9]] and right["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_columns_of_a_prompt_are_kept(model, tokenizer):
    rollouts = generate_rollouts(model, tokenizer, [{"prompt": "w5", "topic": "a"}], max_new_tokens=2)
    assert rollouts[0].columns == {"topic": "a"}


def test_a_sample_depends_on_its_prompt_and_number_not_on_its_batch(model, tokenizer):
    options = {"num_samples": 3, "max_new_tokens": 8, "temperature": 1.5, "seed": 5}
    together = generate_rollouts(model, tokenizer, PROMPTS, batch_size=16, **options)
    assert together == generate_rollouts(model, tokenizer, PROMPTS, batch_size=2, **options)
    more = generate_rollouts(model, tokenizer, PROMPTS, **options | {"num_samples": 5})
    assert together == [rollout for rollout in more if rollout.sample < 3]
    # The first prompts keep their samples when others follow.
    longer = generate_rollouts(model, tokenizer, [*PROMPTS, "w11 w12 w13 w14"], **options)
    assert together == longer[: len(together)]


# Lengths in which some prompts are read together, and some apart; one has nothing to be read before its last token.
LENGTHS = (9, 8, 3, 1, 9)


@pytest.mark.parametrize(
    ("family", "changes"),
    [*((family, {}) for family in FAMILIES), ("mistral", {"sliding_window": 12}), ("gemma2", {"sliding_window": 12})],
)
def test_reading_each_prompt_once_changes_no_response(family, changes, tokenizer, monkeypatch):
    model = tiny_model(family, dtype=torch.float32, **changes)
    prompts = [" ".join(f"w{5 + (7 * i + j) % 60}" for j in range(length)) for i, length in enumerate(LENGTHS)]
    options = {"num_samples": 3, "max_new_tokens": 6, "seed": 1}
    once = generate_rollouts(model, tokenizer, prompts, **options)
    monkeypatch.setattr(sampling, "read_prompts_once", lambda *args: None)
    assert once == generate_rollouts(model, tokenizer, prompts, **options)


@pytest.mark.parametrize("length", [8, 9, 10])
def test_prompts_are_not_read_apart_where_positions_depend_on_the_longest_row(tokenizer, monkeypatch, length):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0],
        "long_factor": [4.0, 9.0],
        "original_max_position_embeddings": 8,
    }
    model = tiny_model("llama", dtype=torch.float32)
    model = type(model)(type(model.config)(**(model.config.to_dict() | {"rope_parameters": rope})))
    prompts = [" ".join(f"w{5 + i + j}" for j in range(length)) for i in range(2)]
    options = {"num_samples": 3, "max_new_tokens": 4, "seed": 1}
    once = generate_rollouts(model, tokenizer, prompts, **options)
    monkeypatch.setattr(sampling, "read_prompts_once", lambda *args: None)
    assert once == generate_rollouts(model, tokenizer, prompts, **options)


def test_a_model_is_probed_once(model, tokenizer, monkeypatch):
    probed = []
    probe = generation._probe
    monkeypatch.setattr(generation, "_probe", lambda model: probed.append(model) or probe(model))
    for _ in range(2):
        generate_rollouts(model, tokenizer, PROMPTS, num_samples=2, max_new_tokens=2)
    assert len(probed) == 1


def test_a_model_without_a_cache_reads_its_prompts_each_time(tokenizer):
    config = OpenAIGPTConfig(vocab_size=97, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    rollouts = generate_rollouts(
        OpenAIGPTLMHeadModel(config), tokenizer, ["w5 w6 w7"], num_samples=2, max_new_tokens=3
    )
    assert len(rollouts) == 2


@pytest.mark.parametrize("layer", [None, -1, 1])
def test_prompts_are_read_once_without_control(model, tokenizer, monkeypatch, layer):
    hook_point = {"hook_point": "lm_head"} if layer is None else {"layer": layer}
    controlled = ReControlForCausalLM.from_model(model, value_head=make_head(**hook_point))
    lengths = []
    controlled.get_input_embeddings().register_forward_hook(lambda module, args, output: lengths.append(output.shape))
    prompts = ["w5 " * 12, "w6 " * 4]
    options = {"control": ControlConfig(step_size=2.0), "num_samples": 4, "max_new_tokens": 5, "seed": 1}
    once = generate_rollouts(controlled, tokenizer, prompts, **options)
    read = [tuple(shape[:2]) for shape in lengths if shape[1] > 1]
    assert read[-2:] == [(1, 11), (1, 3)], "but for the last token, which is read under control"
    monkeypatch.setattr(sampling, "read_prompts_once", lambda *args: None)
    assert once == generate_rollouts(controlled, tokenizer, prompts, **options)
    assert once != generate_rollouts(controlled, tokenizer, prompts, **options | {"control": False})


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 3.0},
        {"min_length": 6},
        {"sequence_bias": [[[0, 9], 5.0]]},
        {"exponential_decay_length_penalty": (2, 3.0)},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_processors_that_read_tokens_see_no_padding(model, tokenizer, settings):
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=8, **settings)
    options = {"num_samples": 4, "generation_config": config}
    together = generate_rollouts(model, tokenizer, PROMPTS, batch_size=12, **options)
    assert together == generate_rollouts(model, tokenizer, PROMPTS, batch_size=1, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {"no_repeat_ngram_size": 0},
        {"encoder_no_repeat_ngram_size": 0},
        {"repetition_penalty": 1.0},
        {"encoder_repetition_penalty": 1.0},
        {"min_length": 0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_are_off_do_not_keep_prompts_of_unlike_lengths_apart(model, tokenizer, settings, monkeypatch):
    sizes = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda self, *a, **k: (sizes.append(len(k["input_ids"])), generate(self, *a, **k))[1]
    )
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=8, **settings)
    assert len(set(map(len, (prompt.split() for prompt in PROMPTS)))) > 1
    together = generate_rollouts(model, tokenizer, PROMPTS, generation_config=config)
    assert sizes == [len(PROMPTS)]
    assert together == generate_rollouts(model, tokenizer, PROMPTS, batch_size=1, generation_config=config)


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_row_s_seed_has_64_bits_on_every_device(device, monkeypatch):
    """Of 32 bits, two of some ten thousand responses would share theirs and be drawn alike."""
    seeds = []

    class Generator:
        def __init__(self, device):
            assert torch.device(device).type != "cpu"

        def manual_seed(self, seed):
            seeds.append(seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    rows = [response_seed(0, prompt, sample) for prompt in range(50) for sample in range(4)]
    RowSampler(rows, torch.device(device))
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**64 for seed in seeds)
    assert sum(seed >= 2**32 for seed in seeds) == 200


def test_a_length_that_counts_the_prompt_is_no_length_of_a_response(model, tokenizer):
    config = GenerationConfig(do_sample=True, max_length=12)
    with pytest.raises(ValueError, match=r"`max_length` \(12\) of the generation config counts the prompt too"):
        generate_rollouts(model, tokenizer, PROMPTS, generation_config=config)
    rollouts = generate_rollouts(model, tokenizer, PROMPTS, generation_config=config, max_new_tokens=5)
    assert max(len(rollout.completion_ids) for rollout in rollouts) <= 5


def test_a_model_without_an_attention_mask_samples_each_row_as_if_alone(tokenizer):
    model = tiny_model("xlstm", dtype=torch.float32)
    options = {"num_samples": 4, "max_new_tokens": 6, "temperature": 2.0}
    together = generate_rollouts(model, tokenizer, PROMPTS, batch_size=12, **options)
    assert together == generate_rollouts(model, tokenizer, PROMPTS, batch_size=1, **options)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0},
        {"temperature": 1.3, "top_k": 5},
        {"top_k": 0, "top_p": 0.6, "repetition_penalty": 1.5},
    ],
)
def test_samples_have_the_distribution_that_generate_draws_from(model, tokenizer, settings):
    """The first token of many samples against the probabilities of transformers' own processors."""
    config = GenerationConfig(do_sample=True, max_new_tokens=1, **settings)
    count = 3000
    rollouts = generate_rollouts(
        model, tokenizer, ["w5 w6 w7"], num_samples=count, generation_config=config, batch_size=1000
    )
    drawn = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=97) / count
    ids = torch.tensor([rollouts[0].prompt_ids])
    with torch.no_grad():
        scores = model(ids).logits[:, -1].float()
    config._eos_token_tensor = None
    processors = model._get_logits_processor(config, input_ids_seq_length=ids.shape[1], device="cpu")
    expected = torch.softmax(processors(ids, scores), -1)[0]
    assert not drawn[expected == 0].any()
    # Total variation of an empirical distribution over some dozens of tokens.
    assert 0.5 * (drawn - expected).abs().sum() < 0.06


def test_rounding_changes_hardly_a_draw_also_of_rare_tokens():
    """Scores of 50,000 tokens, most of them rarer than the rounding, as another batch would round them."""
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(200, 50_000, generator=generator)
    other = scores + 1e-5 * torch.randn(scores.shape, generator=generator)
    seeds, ids = [[0, i] for i in range(len(scores))], torch.zeros(len(scores), 1, dtype=torch.long)
    samplers = [RowSampler(seeds, torch.device("cpu")) for _ in range(2)]
    drawn = [sampler(ids, rows).argmax(-1) for sampler, rows in zip(samplers, (scores, other), strict=True)]
    assert torch.equal(*drawn)
    probabilities = scores.softmax(-1).gather(1, drawn[0][:, None])
    assert (probabilities < 0.01).sum() > 10, "rare tokens are among them"
    assert not torch.equal(samplers[0](ids, scores).argmax(-1), drawn[0]), "the next draw has noise of its own"


@pytest.mark.parametrize("scores", [torch.nan, -torch.inf])
def test_scores_that_nothing_can_be_drawn_from_are_an_error(scores):
    sampler = RowSampler([[0], [1]], torch.device("cpu"))
    rows = torch.zeros(2, 5)
    rows[1] = scores
    with pytest.raises(FloatingPointError, match="NaN"):
        sampler(torch.zeros(2, 1, dtype=torch.long), rows)


@pytest.mark.parametrize("stops", [[""], ["w5", ""], [5]])
def test_a_stop_string_that_would_stop_everything_is_refused(stops):
    with pytest.raises((TypeError, ValueError), match="`stop_strings` must"):
        generate_rollouts(tiny_model("llama"), tiny_tokenizer(), ["w5"], stop_strings=stops)


def test_one_stop_string_may_be_given_as_a_text():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    one, several = (
        generate_rollouts(model, tokenizer, ["w5 w6"], max_new_tokens=6, stop_strings=stops)
        for stops in ("w1", ["w1"])
    )
    assert one == several


def test_noise_made_on_another_device_has_the_distribution_too():
    """The way of accelerators, with torch's generators."""
    sampler = RowSampler([[i] for i in range(4000)], torch.device("cpu"))
    sampler.on_cpu = False
    sampler.generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    drawn = sampler(torch.zeros(4000, 1), probabilities.log().expand(4000, 4)).argmax(-1)
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 4000, probabilities, atol=0.03)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_samples"),
    ],
)
def test_modes_without_seeds_of_their_own_are_errors(model, tokenizer, config, error):
    with pytest.raises(ValueError, match=error):
        generate_rollouts(model, tokenizer, PROMPTS, generation_config=GenerationConfig(**config))


def test_beam_search_and_greedy_search_are_those_of_generate(model, tokenizer):
    for settings in ({"num_beams": 3, "do_sample": False}, {"do_sample": False}):
        config = GenerationConfig(max_new_tokens=6, eos_token_id=2, pad_token_id=0, **settings)
        found = generate_rollouts(model, tokenizer, PROMPTS[:1], generation_config=config)[0]
        output = model.generate(torch.tensor([found.prompt_ids]), generation_config=config)[0, 3:].tolist()
        padding = [0] * (len(output) - len(found.completion_ids))
        assert found.completion_ids + padding == output and found.temperature == 0.0
    with pytest.raises(ValueError, match="would be the same"):
        generate_rollouts(model, tokenizer, PROMPTS, num_samples=2, temperature=0.0)


def load(prompts):
    return load_prompts([{"prompt": text, "topic": i} for i, text in enumerate(prompts)])


def test_a_folder_holds_what_memory_holds(model, tokenizer, tmp_path):
    options = {"num_samples": 3, "max_new_tokens": 6, "seed": 2}
    counts = write_rollouts(tmp_path / "r", model, tokenizer, load(PROMPTS), part_size=4, **options)
    found = load_rollouts(tmp_path / "r")
    assert found == generate_rollouts(model, tokenizer, load(PROMPTS), **options)
    assert counts["rollouts"] == 9 and counts["tokens"] == sum(len(r.completion_ids) for r in found)
    manifest = read_manifest(tmp_path / "r", "rollouts", "")
    assert sorted(manifest["parts"]) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert manifest["settings"]["seed"] == 2 and manifest["versions"]["transformers"]
    files = str(tmp_path / "r" / "*.parquet")
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "cache")
    assert table["completion"][:] == [r.completion for r in found]


def test_a_finished_folder_is_not_sampled_again_and_other_settings_are_refused(
    model, tokenizer, tmp_path, monkeypatch
):
    options = {"max_new_tokens": 4, "part_size": 2}
    counts = write_rollouts(tmp_path, model, tokenizer, load(PROMPTS), **options)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.*")}
    monkeypatch.setattr("hf_recontrol.collection.rollouts._sample", None)
    assert write_rollouts(tmp_path, model, tokenizer, load(PROMPTS), **options) == counts
    other = tiny_model("llama", dtype=torch.float32)
    torch.nn.init.normal_(other.lm_head.weight)
    for change, name in [
        ({"seed": 1}, "seed"),
        ({"max_new_tokens": 5}, "generation_config"),
        ({"temperature": 0.5}, "generation_config"),
        ({"num_samples": 2}, "num_samples"),
        ({"model": other}, "model_fingerprint"),
        ({"prompts": load([*PROMPTS, "w11"])}, "prompts"),
    ]:
        changed = {"model": model, "prompts": load(PROMPTS), **options} | change
        with pytest.raises(ValueError, match=rf"other settings: .*\b{name}"):
            write_rollouts(tmp_path, changed.pop("model"), tokenizer, changed.pop("prompts"), **changed)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    with pytest.raises(ValueError, match=r"other settings: tokenizer"):
        write_rollouts(tmp_path, model, tokenizer, load(PROMPTS), **options)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_prompts_too_long_for_the_model_can_be_left_out(model, tokenizer, tmp_path, recontrol_warnings):
    prompts = load(["w5", "w6 " * 70, "w7"])
    with pytest.raises(ValueError, match="room for 64"):
        write_rollouts(tmp_path / "r", model, tokenizer, prompts, max_new_tokens=4)
    counts = write_rollouts(tmp_path / "r", model, tokenizer, prompts, max_new_tokens=4, on_bad_rows="skip")
    assert counts["rollouts"] == 2 and "room for 64" in recontrol_warnings[0]
    assert [r.prompt_number for r in load_rollouts(tmp_path / "r")] == [0, 2]
    assert read_manifest(tmp_path / "r", "rollouts", "")["bad_rows"] == 1


def test_prompts_longer_than_asked_for_can_be_left_out(model, tokenizer, tmp_path, recontrol_warnings):
    prompts, options = load(["w5", "w6 " * 30, "w7 " * 10]), {"max_new_tokens": 4, "max_prompt_tokens": 10}
    with pytest.raises(ValueError, match=r"row 1: it has 30 tokens, `max_prompt_tokens` is 10"):
        generate_rollouts(model, tokenizer, prompts, **options)
    counts = write_rollouts(tmp_path / "r", model, tokenizer, prompts, **options, on_bad_rows="skip")
    assert counts["rollouts"] == 2 and "it has 30 tokens" in recontrol_warnings[0]
    with pytest.raises(ValueError, match="max_prompt_tokens was 10, is 9"):
        write_rollouts(tmp_path / "r", model, tokenizer, prompts, **options | {"max_prompt_tokens": 9})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_samples": 0}, "num_samples"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"part_size": 0}, "part_size"),
    ],
)
def test_numbers_out_of_range_are_named_before_anything_is_made(model, tokenizer, tmp_path, arguments, name):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        write_rollouts(tmp_path / "r", model, tokenizer, load(PROMPTS), **arguments)
    assert not (tmp_path / "r").exists()


def test_a_prompt_that_the_chat_template_refuses_is_a_bad_row(model, tmp_path, recontrol_warnings):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') if messages | length > 1 else 'w5' }}"
    turn = {"role": "user", "content": "w5"}
    prompts = load_prompts([[turn], [turn, turn]])
    with pytest.raises(ValueError, match="row 1: the chat template does not take the prompt: roles must alternate"):
        write_rollouts(tmp_path / "r", model, tokenizer, prompts, max_new_tokens=2)
    assert (
        write_rollouts(tmp_path / "r", model, tokenizer, prompts, max_new_tokens=2, on_bad_rows="skip")["rollouts"]
        == 1
    )
