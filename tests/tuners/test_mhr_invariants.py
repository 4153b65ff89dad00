"""Invariants of MHR, by number, and the test that checks each; none may be missing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ALGEBRA, IDS, ADAPT, FILES, SYSTEMS, GPU = (
    *(f"tuners/test_mhr_{name}.py" for name in ("algebra", "ids", "adapt", "files", "systems")),
    "gpu/test_mhr_gpu.py",
)
MIXING, COST, TUNER_COSTS, PROCESSES = (
    "ops/test_mixing.py",
    "cost/test_mhr_cost.py",
    "cost/test_tuner_costs.py",
    "integration/test_mhr_processes.py",
)

INVARIANTS: dict[int, tuple[str, list[tuple[str, str]]]] = {
    # Algebra.
    1: ("one head is Poly", [(ALGEBRA, "test_one_head_is_poly_in_pefts_own_words")]),
    2: (
        "one skill is LoRA for any logits, heads and noise",
        [
            (ALGEBRA, "test_one_skill_is_lora_for_any_logits_heads_and_noise"),
            (ALGEBRA, "test_lora_config_equivalent_gives_the_same_output_and_gradients"),
        ],
    ),
    3: ("the same logits in every head are Poly", [(ALGEBRA, "test_the_same_logits_in_every_head_are_poly")]),
    4: (
        "as many skills as tasks, one-hot: private LoRAs",
        [(ALGEBRA, "test_private_skills_or_one_hot_logits_are_one_lora_per_task")],
    ),
    5: ("equal logits are the uniform average", [(ALGEBRA, "test_equal_logits_are_the_uniform_average")]),
    6: ("weights sum to 1 per head", [(ALGEBRA, "test_weights_sum_to_one_within_each_head")]),
    7: (
        "skills and their logits can be permuted",
        [(ALGEBRA, "test_skills_and_their_logits_can_be_permuted_together")],
    ),
    8: (
        "tasks and their ids can be permuted",
        [(ALGEBRA, "test_tasks_and_their_ids_can_be_permuted_together")],
    ),
    9: ("splitting heads is lossless", [(ADAPT, "test_splitting_heads_loses_nothing")]),
    10: (
        "equal to a triple loop that builds the update",
        [
            (ALGEBRA, "test_output_is_the_base_plus_the_update_of_a_triple_loop"),
            (MIXING, "test_mixing_and_applying_equals_the_dense_updates_of_a_triple_loop"),
        ],
    ),
    11: (
        "A and B use the same head weights",
        [(ALGEBRA, "test_both_factors_use_the_weights_of_their_own_head")],
    ),
    12: (
        "factors are averaged, not products",
        [
            (MIXING, "test_factors_are_averaged_before_they_are_multiplied"),
            (ADAPT, "test_mu_is_the_average_of_the_factors_not_of_their_products"),
        ],
    ),
    # Initialisation and gradients.
    13: ("starts as its base", [(ALGEBRA, "test_starts_as_its_base_and_only_b_moves_first")]),
    14: (
        "first gradients of A and logits are 0, of B not",
        [(ALGEBRA, "test_starts_as_its_base_and_only_b_moves_first")],
    ),
    15: (
        "closed-form gradients, gradcheck in fp64",
        [
            (ALGEBRA, "test_gradcheck_through_routing_and_skills"),
            (ALGEBRA, "test_gradients_of_the_logits_are_those_of_the_closed_form"),
            (MIXING, "test_first_and_second_derivatives"),
            (MIXING, "test_the_nodes_equal_the_slow_loop_with_its_gradients"),
        ],
    ),
    16: ("rows of absent tasks get no gradient", [(ALGEBRA, "test_rows_of_absent_tasks_get_no_gradient")]),
    17: (
        "frozen parts have no gradient",
        [(ADAPT, "test_z_changes_no_bit_of_a_skill_and_frozen_gradients_stay_none")],
    ),
    18: (
        "z changes no bit of a skill",
        [(ADAPT, "test_z_changes_no_bit_of_a_skill_and_frozen_gradients_stay_none")],
    ),
    19: (
        "mu is the uncollapsed average under Adam",
        [(ADAPT, "test_mu_trains_the_average_as_adam_trains_all_skills_behind_uniform_weights")],
    ),
    # Modes.
    20: (
        "evaluation is deterministic, and training without noise equals it",
        [(ALGEBRA, "test_evaluation_is_deterministic_and_equals_training_without_noise")],
    ),
    21: (
        "noise is logistic; an undecided skill is open half of the time",
        [
            (ALGEBRA, "test_noise_is_logistic_and_opens_an_undecided_skill_half_of_the_time"),
            (ALGEBRA, "test_temperature_divides_the_noisy_logits_and_opens_skills_all_or_not_at_all"),
        ],
    ),
    22: (
        "same noise, loss and gradients under both kinds of checkpointing",
        [
            (IDS, "test_gradient_checkpointing_changes_neither_loss_nor_gradients"),
            (IDS, "test_checkpointing_by_hand_works_too"),
            (IDS, "test_two_forwards_under_checkpointing_keep_their_own_ids_for_one_backward"),
            (IDS, "test_packed_documents_keep_noise_and_gradients_under_checkpointing"),
            (GPU, "test_checkpointing_keeps_noise_and_gradients"),
        ],
    ),
    23: (
        "logits of ±30 are neither NaN nor a trap, in fp32 and bf16",
        [
            (ALGEBRA, "test_extreme_logits_stay_finite_and_keep_a_gradient"),
            (ALGEBRA, "test_a_bf16_model_routes_in_fp32_whatever_the_logits"),
        ],
    ),
    # Batches.
    24: (
        "a mixed batch equals batches of one task",
        [(IDS, "test_a_mixed_batch_equals_its_rows_alone_in_any_order")],
    ),
    25: (
        "the order of rows does not matter",
        [(IDS, "test_a_mixed_batch_equals_its_rows_alone_in_any_order")],
    ),
    26: (
        "greedy, beams, num_return_sequences, encoder-decoder",
        [
            (IDS, "test_generation_of_a_mixed_batch_equals_its_rows_alone"),
            (IDS, "test_generate_takes_the_ids_itself_and_leaves_those_of_before"),
            (IDS, "test_an_encoder_alone_sees_ids_and_parameters_of_now"),
        ],
    ),
    27: (
        "2-D and 4-D inputs, packed rows",
        [
            (IDS, "test_inputs_of_any_rank"),
            (IDS, "test_packed_rows_route_token_by_token"),
            (IDS, "test_packed_documents_of_a_whole_llama_equal_each_alone"),
            (IDS, "test_a_layer_inside_that_sees_rows_and_tokens_flattened_is_routed"),
        ],
    ),
    28: (
        "one task, some shared, one a row: all paths agree",
        [
            (IDS, "test_gradients_agree_however_rows_share_tasks"),
            (SYSTEMS, "test_mixing_together_equals_mixing_layer_by_layer"),
        ],
    ),
    29: (
        "bad ids raise",
        [
            (IDS, "test_wrong_ids_raise"),
            (IDS, "test_missing_ids_raise_until_set_and_after_cleared"),
            (IDS, "test_ids_for_fewer_rows_raise_in_training_instead_of_repeating"),
            (IDS, "test_names_of_one_adapter_are_not_read_as_rows_of_another"),
            (IDS, "test_two_threads_never_get_each_others_ids"),
        ],
    ),
    # Files.
    30: (
        "whole and routing-only files",
        [
            (FILES, "test_every_state_loads_bit_equal_on_a_fresh_base"),
            (FILES, "test_every_router_loads_bit_equal"),
            (FILES, "test_a_new_process_loads_every_state_bit_equal_once_it_has_imported_the_tuners"),
            (FILES, "test_routing_alone_turns_shared_skills_to_other_tasks"),
        ],
    ),
    31: (
        "added tasks leave old ones bit-identical",
        [(ADAPT, "test_added_tasks_leave_the_old_ones_bit_identical")],
    ),
    32: (
        "to_lora and merge equal the routed output, in fp32, bf16 and on quantised bases",
        [
            (FILES, "test_a_task_is_a_stock_lora"),
            (FILES, "test_one_task_merges_into_the_weights_and_out_again"),
            (SYSTEMS, "test_one_task_in_bf16_is_its_merged_weights_within_rounding"),
            (SYSTEMS, "test_a_quantised_base_trains_as_the_dense_one_with_its_weights_and_exports"),
            (SYSTEMS, "test_a_quantised_weight_is_merged_as_peft_knows_how_or_not_at_all"),
            (SYSTEMS, "test_four_bit_bases_train_and_merge"),
        ],
    ),
    33: (
        "an adapter of PEFT's Poly is equal",
        [(FILES, "test_a_poly_adapter_of_peft_is_equal_in_evaluation")],
    ),
    34: ("parameter counts of T5-XL", [(ADAPT, "test_parameter_counts_of_t5_xl")]),
    # Systems.
    35: (
        "compiles without graph breaks",
        [
            (SYSTEMS, "test_compiles_without_graph_breaks_and_again_only_for_another_layout"),
            (SYSTEMS, "test_a_compiled_llama_equals_the_eager_one"),
            (GPU, "test_a_compiled_step_equals_an_eager_one"),
        ],
    ),
    36: (
        "bytes kept for backward, no copy of the input",
        [
            (COST, "test_little_is_kept_for_backward_and_no_copy_of_the_input"),
            (MIXING, "test_nothing_but_the_input_mixed_factors_and_xa_is_kept_for_backward"),
            (TUNER_COSTS, "test_mhr_on_one_linear_is_few_operations_and_keeps_no_copy_of_the_input"),
        ],
    ),
    37: (
        "no wait for the device in a forward",
        [
            (COST, "test_a_training_forward_is_few_operators_and_never_waits_for_the_device"),
            (GPU, "test_no_step_waits_for_the_device_where_ids_lie_on_the_host"),
        ],
    ),
    38: (
        "two processes equal one, DDP and FSDP2",
        [(PROCESSES, "test_two_processes_equal_one"), (PROCESSES, "test_a_wrapper_takes_ids_in_every_way")],
    ),
    39: (
        "kept mixtures follow optimiser steps and every other change",
        [
            (SYSTEMS, "test_a_kept_mixture_is_forgotten_when_anything_it_came_from_changes"),
            (GPU, "test_kept_mixtures_follow_a_fused_optimiser"),
        ],
    ),
}


def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_none_is_missing() -> None:
    assert list(INVARIANTS) == list(range(1, 40))


@pytest.mark.parametrize("number", INVARIANTS)
def test_each_has_a_test_that_is_there(number: int) -> None:
    _, tests = INVARIANTS[number]
    for file, name in tests:
        assert name in functions(file), f"{number}: tests/{file} has no {name}"
