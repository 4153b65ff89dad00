"""Invariants of PaCA and the tests that check them; this file tests that those tests exist.

Numbers are those of the project's specification; 17, on quantised bases, waits for them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

INVARIANTS = {
    "1 output at the start is the base's, bit for bit": (
        "tuners/test_paca_layers.py::test_output_at_the_start_is_the_bases_bit_for_bit",
        "tuners/test_paca_layers.py::test_output_at_the_start_is_the_bases_in_bfloat16_and_under_autocast",
        "tuners/test_paca_layers.py::test_output_at_the_start_is_the_bases_of_every_kind_of_layer",
    ),
    "2 the gradient is s times the dense one, at the columns": (
        "ops/test_partial_linear.py::test_gradient_equals_dense_gradient_on_selected_columns",
        "ops/test_partial_linear.py::test_gradient_of_a_transposed_input_and_of_an_expanded_output_gradient",
        "ops/test_partial_conv.py::test_gradient_equals_dense_gradient_on_selected_channels",
        "tuners/test_paca_layers.py::test_gradient_is_the_scaled_dense_gradient_of_the_columns",
        "tuners/test_paca_layers.py::test_gradcheck_through_the_written_weight",
        "tuners/test_paca_layers.py::test_autocast_gives_the_gradient_of_a_bfloat16_product",
    ),
    "3 all columns train like full fine-tuning, step for step": (
        "tuners/test_paca_layers.py::test_all_columns_train_like_full_fine_tuning_decaying_to_the_pretrained_values",
        "tuners/test_paca_layers.py::test_a_convolution_with_every_channel_selected_trains_like_the_convolution",
    ),
    "4 every forward runs on the columns of the last step": (
        "tuners/test_paca_writes.py::test_every_forward_uses_the_new_columns",
        "tuners/test_paca_writes.py::test_a_step_that_gradscaler_skips_changes_nothing",
        "tuners/test_paca_writes.py::test_gradient_checkpointing_changes_no_gradient",
        "tuners/test_paca_writes.py::test_parameters_swapped_by_eval_and_train_are_used",
    ),
    "5 other weights are untouched, and all of W comes back": (
        "tuners/test_paca_layers.py::test_other_weights_are_untouched_for_ever_and_all_come_back",
        "tuners/test_paca_layers.py::test_a_negative_zero_survives",
        "tuners/test_paca_peft.py::test_disabled_the_output_and_every_weight_are_the_bases_bit_for_bit",
        "tuners/test_paca_peft.py::test_deleting_an_adapter_takes_only_its_columns_out",
    ),
    "6 merging changes no bit of the output": (
        "tuners/test_paca_peft.py::test_merge_and_unload_gives_the_adapted_output_without_layers_of_ours",
        "tuners/test_paca_peft.py::test_merge_is_a_change_of_flag",
        "tuners/test_paca_peft.py::test_safe_merge_refuses_nan_and_leaves_the_model_as_it_was",
    ),
    "7 saved and loaded it is the same, by every door": (
        "tuners/test_paca_save.py::test_loaded_by_peft_the_output_is_bit_equal",
        "tuners/test_paca_save.py::test_loaded_by_transformers_itself",
        "tuners/test_paca_save.py::test_a_fresh_process_needs_only_the_one_import",
        "tuners/test_to_lora.py::test_a_trained_llama_equals_its_lora",
    ),
    "8 beyond the floor only the selected inputs are kept": (
        "cost/test_paca_cost.py::test_what_is_kept_for_backward_is_the_floor_and_the_selected_inputs",
        "cost/test_paca_cost.py::test_no_whole_input_of_an_adapted_layer_is_kept",
        "cost/test_tuner_costs.py::test_lean_blocks_bring_paca_below_the_floor",
        "cost/test_tuner_costs.py::test_lean_blocks_keep_two_thirds_in_bf16_at_the_proportions_of_the_8b",
    ),
    "9 r · outputs numbers are trained, twice that is Adam's": (
        "tuners/test_paca_layers.py::test_trainable_count_is_r_times_outputs_and_adam_keeps_twice_that",
    ),
    "10 seed and name alone choose the columns": (
        "tuners/test_paca_selection.py::test_random_columns_are_these_for_ever",
        "tuners/test_paca_selection.py::test_random_columns_depend_on_seed_and_name_and_nothing_else",
    ),
    "11 adapters may overlap, in any order": (
        "tuners/test_paca_peft.py::test_overlapping_adapters_switch_add_up_and_leave_in_any_order",
        "tuners/test_paca_peft.py::test_two_active_adapters_both_get_the_dense_gradient",
    ),
    "12 several processes train what one would; a resumed run is an uninterrupted one": (
        "integration/test_paca_processes.py::test_two_processes_train_what_one_would",
        "tuners/test_paca_trainers.py::test_resumed_training_equals_uninterrupted_training_bit_for_bit",
        "integration/test_text_resume.py::test_resuming_after_a_crash_equals_never_having_stopped",
    ),
    "13 compiled it is one graph, never compiled anew": (
        "tuners/test_paca_compile.py::test_compiled_training_is_eager_training_in_one_graph",
    ),
    "14 operations and time stay near the floor's": (
        "cost/test_paca_cost.py::"
        "test_a_block_of_seven_linears_adds_at_most_7_operations_forward_and_16_backward",
        "cost/test_tuner_costs.py::"
        "test_a_step_of_paca_costs_little_more_than_the_floor_and_less_than_one_of_lora",
    ),
    "15 no state dict holds a changed column": (
        "tuners/test_paca_peft.py::test_state_dict_of_the_base_never_holds_a_changed_column",
        "integration/test_paca_processes.py::"
        "test_an_fsdp2_checkpoint_holds_the_original_weights_and_disabling_brings_them_back",
    ),
    "16 what cannot work is refused by name": (
        "tuners/test_paca_peft.py::test_tied_weights_are_refused_with_their_partner",
        "tuners/test_paca_peft.py::test_more_columns_than_inputs_is_refused_with_what_would_work",
        "tuners/test_paca_peft.py::test_an_unsupported_layer_is_named_with_the_supported_ones",
        "tuners/test_paca_config.py::test_a_value_that_cannot_work_is_named",
        "tuners/test_paca_selection.py::test_bad_indices_are_named",
    ),
}


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_every_invariant_is_tested(invariant: str) -> None:
    for test in INVARIANTS[invariant]:
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
