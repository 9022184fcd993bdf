"""What is asked by ``-m thorough`` and by ``.ci/run``, and not in every run: the dear cases.

A run of the default suite asks every law, of a few; here stands which few. The key is a test; the
value names, by parts of their ids, the cases that stay in the default suite: none, if it is empty.
Of a test over `registry.REGISTRY` the cases of `registry.ALWAYS` stay, without a line here.
"""

ALWAYS_ASKED: dict[str, tuple[str, ...]] = {
  # Optimizers: programs that are compiled once more for each case.
  "test_blocks.py::test_layout": ("-log8", "power4_unsigned", "nf4"),
  "test_came.py::test_a_stack_of_layers_is_its_layers": (),
  "test_codebooks.py::test_a_slow_average_follows": ("0.999-power8",),
  "test_composition.py::test_composes": ("chain", "multi_steps-adamw-4"),
  "test_composition.py::test_quantizes_what_is_composed": ("clipped-8", "injected-8", "muon-4"),
  "test_contract.py::test_every_shape": ("adamw-4",),
  "test_contract.py::test_moments_are_computed_in_float32_whatever_the_parameters": ("adamw-8",),
  "test_dtypes.py::test_a_parameter_may_be_a_python_number": (
    "adamw-8-8 bits",
    "adamw-8-offloaded",
    "came-8-8 bits",
  ),
  "test_elementwise.py::test_elementwise_rules_are_accepted_and_run_leaf_by_leaf": (
    "[adam]",
    "scheduled",
    "lion",
  ),
  "test_extra_args.py::test_what_is_no_array_is_not_traced": (
    "quantized-a flag",
    "32 bits-in a tree",
    "offloaded-beside numbers",
  ),
  "test_factored.py::test_32_bits_are_optax": ("plain-0.01", "[momentum"),
  "test_factored.py::test_few_bits_stay_near": ("[8]",),
  "test_factored.py::test_hugging_faces_modes": (),
  "test_golden.py::test_4_bits_of_every_rule_stay_closer_than_torchaos_adamw": (
    "AdamW8bit-w",
    "AdEMAMix8bit-tail",
  ),
  "test_golden.py::test_stays_at_least_as_close_to_float32_as_the_peer": (
    "AdamW8bit",
    "Lion8bit-w",
  ),
  "test_gpu_benchmark.py::test_gpu_benchmark_on_a_cpu": (),
  "test_hyperparameters.py::test_a_mask_is_never_called_as_a_schedule": ("[adamw", "lamb-mask"),
  "test_kernels.py::test_bits_equal_those_of_the_tile_loop": ("adamw, 8 bits, masked", "lion"),
  "test_kernels.py::test_any_number_of_blocks": ("shape2",),
  "test_kernels.py::test_optimizers_lower_for_cuda": ("adamw",),
  "test_offloaded.py::test_a_thousand_steps_are_bit_equal": ("8 bits",),
  "test_offloaded.py::test_by_rows_it_is_the_same": ("adamw 8-two lanes", "came 8-one lane"),
  "test_offloaded.py::test_composes": ("multi_steps", "chain-outermost"),
  "test_offloaded.py::test_no_more_state_is_on_the_device_than_allowed": ("8 bits",),
  "test_offloaded.py::test_the_obvious_loop_runs": ("[all]",),
  "test_offloaded.py::test_what_is_passed_to_update_may_be_a_function": (),
  "test_norms.py::test_few_bits_stay_near": ("lamb-8",),
  "test_offloaded_manual.py::test_on_two_devices": (),
  "test_optax.py::test_inject_hyperparams_is_told_what_is_static": ("[adamw]", "lars", "came"),
  "test_phases.py::test_rules_that_take_norms_are_the_same_in_phases": ("8-came", "4-lamb"),
  "test_sharding.py::test_on_eight_devices": ("quick",),
  "test_state_shardings.py::test_on_eight_devices": (),
  # Layers and models.
  "test_linen_models.py::test_gradients_are_those_of_the_merged_weights": ("unrolled",),
  "test_linen_layers.py::test_packed_layer_is_nf4linear_on_denses_kernel": ("nf4",),
  "test_llama.py::test_gradient_memory_is_under_a_quarter_of_the_weights": (),
  "test_llama.py::test_other_codes_are_those_of_quantize_model": (),
  "test_llama_architectures.py::test_each_detail_matters": (),
  "test_llama_architectures.py::test_quantized_linears_keep_their_biases": ("qwen2",),
  "test_llama_attention.py::test_chunks_give_the_numbers_of_whole_scores": (
    "48-4-2-16-False",
    "50-3-1-8-True",
  ),
  "test_llama_families.py::test_a_quantized_model_learns_by_adapters_on_every_linear": ("gemma2",),
  "test_llama_families.py::test_packed_rows_and_the_cache_give_what_each_row_gives_alone": (
    "smollm3",
  ),
  "test_llama_generation.py::test_greedy_tokens_are_those_of_transformers": (
    "llama3",
    "qwen2_yarn",
    "gemma3",
    "phi3_long",
  ),
  "test_llama_generation.py::test_logits_with_cache_are_those_without": ("True",),
  "test_llama_packed.py::test_no_gradient_crosses_a_segment": ("True",),
  "test_moments.py::test_stays_close_to_float32": ("adamw", "muon"),
  "test_nn_adapters.py::test_an_adapters_own_bias_is_merged_where_outputs_are_permuted": ("3",),
  "test_nn_adapters.py::test_general_layers": ("heads-True", "experts"),
  "test_nn_adapters.py::test_layers_of_a_stack_differ_in_rank_and_stay_so_in_training": ("True",),
  "test_nn_adapters.py::test_what_is_trained_whole_is_held_in_32_bits": ("bfloat16",),
  "test_nn_foreign.py::test_a_layer_of_any_class_is_seen_as_its_matrix": ("[q]", "experts"),
  "test_nn_foreign.py::test_trains_a_model_of_such_layers": (),
  "test_nn_nf4.py::test_gradient_of_16_layers_needs_no_more_than_one_or_two": ("True-False-False",),
  "test_nn_nf4.py::test_other_codes_and_blocks": ("-64",),
  "test_nn_devices.py::test_on_eight_devices": (),
  # The program: each is a run of it.
  "test_examples.py::test_full_finetune_by_another_rule_with_its_state_on_the_host": (),
  "test_examples.py::test_full_finetune_goes_on_where_it_stopped": (),
  "test_finetune.py::test_a_resumed_run_is_not_changed_unnoticed": (),
  "test_qlora_checkpoints.py::test_killed_at_a_random_step_and_resumed_is_bit_for_bit_the_same": (
    "9",
  ),
  "test_qlora_export.py::test_a_base_file_and_what_the_adapter_says_is_the_adapted_model": (
    "qwen3",
  ),
  "test_qlora_faults.py::test_metrics_never_decide_whether_a_run_goes_on": ("binary",),
  "test_qlora_devices.py::test_the_numbers_of_one_device": (),
  "test_qlora_families.py::test_the_script_trains_and_merges": (),
  "test_qlora_options.py::test_options": ("variants", "plan"),
}
