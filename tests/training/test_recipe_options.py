"""Options of the recipe path: names and defaults of the reference, types, batch arithmetic, places,
presets, the index of recipes."""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT

from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.training.recipe import index, options
from workshop_utils.training.recipe.options import RecipeOptions, from_file, from_mapping, from_text
from workshop_utils.training.recipe.plan import LAYERS, notices, resolve
from workshop_utils.training.recipe.presets import PRESETS, preset

REFERENCE = yaml.safe_load("""
peft_megatron.py:
  {hf_model_id: Qwen/Qwen3-8B, recipe_cls_name: qwen3_8b, output_dir: "outputs/{hf_model_id}",
   nemo_ckpt_dir: "{output_dir}/imported_hf_ckpt", num_nodes: 1, gpus_per_node: 8, node_rank: 0,
   tensor_parallel_size: 8, pipeline_parallel_size: 1, context_parallel_size: 1, max_steps: 10000,
   val_check_interval: 800, log_every_n_steps: 10, micro_batch_size: 8, accumulate_grad_batches: 8,
   limit_val_batches: 80, early_stopping_patience: 3, early_stopping_threshold: 0.001,
   max_seq_length: 2048, peft_scheme: lora, full_ft: false, enable_megatron_progress_bar: false,
   enable_nsys_callback: false, enable_pytorch_profiler: false, enable_speed_monitor: false,
   enable_memory_monitor: false, enable_runtime_estimator: false, enable_memory_profile: false,
   use_wandb: false}
dataset_module.py:
  {hfdc_dataset_name: cognitivecomputations/dolphin, hfdc_split: train, hfdc_num_proc: 8,
   hfdc_train_split_ratio: 0.9, hfdc_val_test_split_ratio: 0.5}
test_checkpoint.py:
  {nemo_logs_dir: null, test_path: null, max_samples: 1024, temperature: 0.1, top_k: 0, top_p: 0.95,
   num_tokens_to_generate: 512, random_seed: 42, max_batch_size: 16, block_size_tokens: 256,
   buffer_size_gb: 20.0, max_tokens: 65536, inference_max_seq_length: 8192}
convert_checkpoint_to_hf.py: {target: hf, no_merge: false, overwrite: false, use_modelopt: false}
""")
ELSEWHERE = {"data_dir", "hfdc_dataset_config", "hfdc_input_template", "hfdc_output_template"}
ELSEWHERE |= {"hfdc_field_mapping", "hfdc_load_kwargs", "hfdc_custom_converter"}
"""Options of the reference whose default depends on others, or that it takes in code only."""
NEMO = Path(importlib.util.find_spec("nemo").submodule_search_locations[0])
RECIPES = NEMO / "collections/llm/recipes"


def test_names_and_defaults_are_those_of_the_reference():
    for script, expected in REFERENCE.items():
        ours = {
            name
            for name, field in options.FIELDS.items()
            if field.metadata["script"] == script and not field.metadata["added"]
        }
        assert ours - ELSEWHERE == set(expected)
        assert {name: options.default(name) for name in expected} == expected


def test_the_defaults_resolve_to_the_references_paths_batch_and_texts():
    plan = resolve(RecipeOptions())
    assert (plan.world_size, plan.data_parallel_size, plan.global_batch_size) == (8, 1, 64)
    assert plan.output_dir == Path("outputs/Qwen/Qwen3-8B").absolute()
    assert plan.nemo_ckpt_dir == plan.output_dir / "imported_hf_ckpt"
    assert plan.run_dir == plan.output_dir / "nemo_logs"
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    prompt, answer = (template.render(row, {}) for template in plan.dataset.templates())
    assert prompt == "### Instruction:\nAdd.\n ### Input:\n1 and 2\n"
    assert answer == "### Response:\n3"


OTHER = {"hfdc_dataset_name": "some/other"}
SHARES = {"hfdc_train_split_ratio": 0.8, "hfdc_val_test_split_ratio": 0.25}


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, "cognitivecomputations_dolphin/flan1m-alpaca-uncensored/train=90%-val=5%-test=5%"),
        # What belongs to the default data set is not applied to another.
        (OTHER, "some_other/default/train=90%-val=5%-test=5%"),
        (OTHER | SHARES, "some_other/default/train=80%-val=15%-test=5%"),
    ],
)
def test_the_folder_of_the_data_says_name_configuration_and_shares(given, folder):
    plan = resolve(RecipeOptions(**given))
    assert plan.data_dir == Path("datasets", folder).absolute()
    assert (plan.dataset.input_template is None) == bool(given)


@pytest.mark.parametrize(
    ("given", "data_parallel", "batch"),
    [
        ("{tensor_parallel_size: 2}", 4, 256),
        ("{tensor_parallel_size: 2, context_parallel_size: 2}", 2, 128),
        ("{num_nodes: 2, pipeline_parallel_size: 2}", 1, 64),
        (
            "{num_nodes: 4, tensor_parallel_size: 4, accumulate_grad_batches: 1, "
            "micro_batch_size: 1}",
            8,
            8,
        ),
        # DoRA with tensor parallelism where NeMo saves it right.
        ("{peft_scheme: dora, lora_target_modules: [linear_qkv]}", 1, 64),
        ("{peft_scheme: dora, tensor_parallel_size: 1, pipeline_parallel_size: 8}", 1, 64),
        # A short run takes its own warm-up.
        ("{max_steps: 50, val_check_interval: 10, warmup_steps: 0}", 1, 64),
    ],
)
def test_batch_arithmetic(given, data_parallel, batch):
    plan = resolve(RecipeOptions(**yaml.safe_load(given)))
    assert (plan.data_parallel_size, plan.global_batch_size) == (data_parallel, batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{pipeline_parallel_size: 2}", "one copy of the model takes 16"),
        ("{context_parallel_size: 2}", "context_parallel_size 2"),
        ("{tensor_parallel_size: 3}", "2 would be left over"),
        ("{enable_nsys_callback: true, enable_memory_profile: true}", "one profiler"),
        ("{recipe_cls_name: llama3_1_8b}", "llama31_8b"),
        ("{recipe_cls_name: qwen3_70b}", "Did you mean"),
        ("{recipe_cls_name: nemotron_8b}", "nemotron3_8b"),
        ("{recipe_cls_name: llama3_8b_16k}", "no fine-tuning recipe"),
        ("{recipe_cls_name: mamba2_130m}", "takes only full_ft"),
        ("{full_ft: true, peft_scheme: dora}", "choose one"),
        ("{node_rank: 1}", "numbered from 0"),
        ("{packed_sequence: true}", "micro_batch_size must be 1"),
        ("{max_steps: 5}", "nothing would be validated"),
        ("{max_steps: 800, warmup_steps: 800}", "warmup_steps 800 must be below max_steps 800"),
        (
            "{max_steps: 50, val_check_interval: 10}",
            r"warmup_steps \(none: the 50 of qwen3_8b\) must be below max_steps 50.* Set "
            "warmup_steps=5,",
        ),
        (
            "{peft_scheme: dora}",
            "tensor_parallel_size 8: NeMo .* Set tensor_parallel_size=1 .* "
            "lora_target_modules=linear_qkv",
        ),
        (
            "{peft_scheme: dora, lora_target_modules: [linear_qkv, linear_fc1]}",
            "magnitudes of linear_fc1 in the order of the ranks",
        ),
        ("{use_modelopt: true}", "quantised"),
        ("{target: nemo2, no_merge: true}", "no_merge"),
        (
            "{full_ft: true, no_merge: true}",
            "no_merge exports an adapter, and a full fine-tune has none",
        ),
        ("{full_ft: true, target: nemo2}", "its checkpoint is a whole NeMo 2.0 model"),
        ("{top_k: 5}", "top_k is 5 and top_p 0.95: Megatron-Core takes one"),
        (
            "{num_tokens_to_generate: 8192}",
            "num_tokens_to_generate is 8192 .* 8192: no prompt would fit",
        ),
        ("{lora_target_modules: [linear_qvk]}", "is called linear_qvk. Did you mean linear_qkv"),
        (
            "{lora_target_modules: [linear_qkv, '*.layers.0.*.q_proj']}",
            "called q_proj. There are .* q_proj, k_proj and v_proj together are linear_qkv",
        ),
        (
            "{hfdc_custom_converter: 'absent.py:row'}",
            "hfdc_custom_converter: .*absent.py does not exist",
        ),
        ("{hfdc_custom_converter: row}", "hfdc_custom_converter is 'row'; write FILE.py:function"),
        ("{output_dir: '{hf_model}'}", "hf_model_id"),
        ("{output_dir: '{'}", "output_dir"),
        ("{hfdc_train_split_ratio: 1.0}", "hfdc_train_split_ratio"),
        ("{hfdc_dataset_name: a/b, hfdc_field_mapping: {x: y}}", "hfdc_field_mapping"),
        ("{device: cpu}", "precision"),
        (
            "{device: cpu, precision: '32', context_parallel_size: 2, gpus_per_node: 16}",
            "context_parallel_size",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(given, message):
    with pytest.raises(WorkshopError, match=message):
        resolve(RecipeOptions(**yaml.safe_load(given)))


@pytest.mark.parametrize(
    "names",
    [
        ("linear_qkv", "linear_fc1"),
        ("*.layers.0.*.linear_qkv",),
        ("*.mlp.*",),
        ("linear_kv_up_proj",),
        ("in_proj",),
    ],
)
def test_layers_and_patterns_of_layers(names):
    assert resolve(RecipeOptions(lora_target_modules=names)).options.lora_target_modules == names


def test_every_linear_layer_of_the_installed_megatron_core_is_known():
    """A name that is missing in our list would be refused."""
    core = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
    layer = re.compile(
        r"self\.(\w*(?:linear|proj|output_layer)\w*) = "
        r"(?:build_module|tensor_parallel\.ColumnParallelLinear)\("
    )
    folders = ("transformer", "ssm", "models/gpt", "models/mamba")
    files = [file for folder in folders for file in (core / folder).rglob("*.py")]
    used = {name for file in files for name in layer.findall(file.read_text())}
    assert "linear_qkv" in used and used <= set(LAYERS)


def test_what_runs_on_one_process_or_machine_is_said():
    (note,) = notices(resolve(RecipeOptions()))
    assert note.startswith("test and export run on one process")
    assert notices(resolve(RecipeOptions(tensor_parallel_size=1))) == []
    assert "trains on one machine" in notices(resolve(RecipeOptions(num_nodes=2)))[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": "5"}, "max_steps is '5'; it must be a whole number, at least 1."),
        ({"max_steps": True}, "whole number"),
        ({"max_steps": 1.5}, "whole number"),
        ({"max_steps": 0}, "at least 1"),
        ({"early_stopping_threshold": "x"}, "a number"),
        ({"early_stopping_threshold": float("nan")}, "a number"),
        ({"learning_rate": 0}, "a number or none, above 0"),
        ({"top_p": 1.5}, "at least 0 and at most 1"),
        ({"full_ft": "yes"}, "true or false"),
        ({"peft_scheme": "lorra"}, "one of lora, dora, full_ft"),
        ({"hf_model_id": " "}, "a text"),
        ({"hfdc_field_mapping": {"a": 1}}, "a mapping"),
        ({"lora_target_modules": "linear_qkv"}, "list of names"),
        ({"lora_target_modules": ()}, "list of names"),
    ],
)
def test_types_and_ranges(given, message):
    with pytest.raises(WorkshopError, match=message):
        RecipeOptions(**given)


def test_a_whole_number_is_a_number_and_a_list_of_names_is_taken():
    given = RecipeOptions(learning_rate=1, lora_target_modules=["linear_qkv"])
    assert (given.learning_rate, given.lora_target_modules) == (1.0, ("linear_qkv",))
    assert isinstance(given.learning_rate, float)


def test_full_fine_tuning_has_two_spellings():
    for given in ({"full_ft": True}, {"peft_scheme": "full_ft"}):
        chosen = resolve(RecipeOptions(**given)).options
        assert (chosen.peft_scheme, chosen.full_ft) == ("full_ft", True)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("max_step", "max_steps"),
        ("hf-model-id", "hf_model_id"),
        ("global_batch_size", "micro_batch_size x accumulate_grad_batches"),
        ("model_path", "give that as hf_model_id"),
        (3, "no option"),
    ],
)
def test_a_mistyped_key_is_answered_with_the_right_one(key, message):
    with pytest.raises(WorkshopError, match=message):
        from_mapping({key: 1})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_steps", "12", 12),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "none", None),
        ("lora_target_modules", "linear_qkv, linear_proj", ("linear_qkv", "linear_proj")),
        ("hfdc_field_mapping", '{"a": "b"}', {"a": "b"}),
        ("hf_model_id", "none", "none"),
    ],
)
def test_text_of_the_command_line_becomes_values(name, text, value):
    assert from_text(name, text) == value


def test_a_yaml_file_names_itself_in_errors(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(
        "learning_rate: 1e-4\nlora_target_modules: [linear_qkv]\nhfdc_field_mapping: {a: b}\n"
    )
    given = from_file(file)
    assert (given.learning_rate, given.lora_target_modules) == (1e-4, ("linear_qkv",))
    assert given.hfdc_field_mapping == {"a": "b"}
    for text, message in (
        ("max_step: 3", "my.yaml: max_step is no option"),
        ("max_steps: ten", "my.yaml: max_steps is 'ten'"),
        ("a: [", "line"),
    ):
        file.write_text(text)
        with pytest.raises(WorkshopError, match=message):
            from_file(file)
    with pytest.raises(WorkshopError, match="absent.yaml"):
        from_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_survive_json(name):
    """As the training process gets them."""
    chosen = from_mapping(preset(name))
    assert from_mapping(json.loads(json.dumps(dataclasses.asdict(chosen)))) == chosen
    plan = resolve(chosen)
    assert plan.output_dir.is_relative_to(paths.runs_dir()) and plan.data_dir.name == "tickets"


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("/data/models/My Model", "My Model"),
        ("../llama", "llama"),
        ("ngc://nvidia/nemo/llama:2.0", "nvidia/nemo/llama_2.0"),
        ("hf://a/b-1.5", "a/b-1.5"),
    ],
)
def test_a_model_from_elsewhere_stays_inside_the_outputs(model, folder):
    plan = resolve(RecipeOptions(hf_model_id=model))
    assert plan.output_dir == Path("outputs", folder).absolute()


def test_the_page_has_every_option():
    page = (ROOT / "docs/recipe-options.md").read_text()
    assert options.table() in page
    assert all(script in page.partition("## All options")[0] for script in options.SCRIPTS)


def test_the_index_is_that_of_the_installed_nemo():
    """From NeMo's source: the modules that its package of recipes imports and that give a model,
    and whether they can fine-tune."""
    found = {}
    for node in ast.parse((RECIPES / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "nemo.collections.llm.recipes":
            for name in (alias.name for alias in node.names):
                body = ast.parse((RECIPES / f"{name}.py").read_text()).body
                # Name of a function -> whether each of its arguments has a default.
                complete = {
                    one.name: len(one.args.defaults) == len(one.args.args)
                    for one in body
                    if isinstance(one, ast.FunctionDef)
                }
                if complete.get("model"):
                    found[name] = complete.get("finetune_recipe", False)
    assert {name: bool(recipe.schemes) for name, recipe in index.recipes().items()} == found
    assert found["qwen3_8b"]


def test_the_index_knows_the_model():
    recipe = index.find("llama32_1b")
    assert (recipe.model, recipe.config) == ("LlamaModel", "Llama32Config1B")
    assert (recipe.layers, recipe.hidden, recipe.tensor_parallel_size) == (16, 2048, 1)
    assert (recipe.global_batch_size, recipe.base) == (128, "meta-llama/Llama-3.2-1B")
    assert recipe.schemes["lora"]["warmup_steps"] == 50
    assert "lora_dim" not in recipe.schemes["full_ft"]
    assert index.find("deepseek_v3").pipeline_parallel_size == 5


@pytest.mark.slow
def test_the_index_is_what_nemo_builds():
    """Every recipe built by NeMo itself, in a process of its own."""
    program = (
        "import json; from workshop_utils.training.recipe import index; made = "
        "json.dumps(index.generate()); print(); print(made)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "WORKSHOP_DEVICE": "cpu"},
    )
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(index.FILE.read_text())
