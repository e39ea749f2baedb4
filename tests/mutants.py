"""Break the code on purpose and see every fault caught. Run by `nox -s mutants`.

Each mutant is a copy of the tree with one edit, sealed again (the seal would otherwise notice every one). A
fault that a claim must notice is put through `python -m selfcheck run --quick --only CLAIM`; a fault of the
harness or of the library's contract goes to one named test. Every check is first run on a copy without a fault
and must pass there: otherwise it would catch anything. A mutant that survives is an error of the check. The
table of all of them is written to tests/MUTANTS.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from selfcheck.harness.files import ROOT, write_atomic

COPIED = (
    "src",
    "selfcheck",
    "figures",
    "paper",
    "archive",
    "requirements",
    "tests",
    ".ci",
    "constraints.txt",
    "constraints-gpu.txt",
    "pyproject.toml",
    "noxfile.py",
    ".gitattributes",
    ".gitignore",
    "README.md",
    "benchmarks",
    "examples",
    "THREATS.md",
    "CONTRIBUTING.md",
    "CITATION.cff",
    "codemeta.json",
    ".zenodo.json",
    "LICENSE-CODE.txt",
    "LICENSE-TEXT-DATA.txt",
)
TABLE = ROOT / "tests/MUTANTS.md"
WORKERS = 2
CONTROL = "control"


class Mutant(NamedTuple):
    by: str  #: claim, or file::test
    fault: str
    file: str
    old: str
    new: str


THEOREM, FLOATING, PROOF = "selfcheck/checks/theorem.py", "selfcheck/checks/floating.py", "paper/proofs/QueryAxis.v"
ARITHMETIC, SELECTION = "src/qaxis/arithmetic/reference.py", "src/qaxis/attention/selection.py"
RULES, KERNELS, REFERENCE = (
    "src/qaxis/arithmetic/triton.py",
    "src/qaxis/attention/triton.py",
    "src/qaxis/attention/reference.py",
)
OF_EVIDENCE, STRICT, CONTENT, COMPARING = (
    "test_evidence.py::",
    "selfcheck/harness/strict.py",
    "selfcheck/harness/content.py",
    "selfcheck/harness/comparing.py",
)
LIBRARY, MODEL, HARNESS = "test_library.py::", "test_model.py::", "test_harness.py::"
CACHE, QUANTIZATION, KERNELS_QUANTIZED = (
    "test_cache.py::",
    "src/qaxis/storage/grid.py",
    "src/qaxis/storage/triton.py",
)
DIRECT = CACHE + "test_kernels_read_the_codes_and_give_the_bits_of_the_dequantised_cache"
SITUATIONS, CACHES = "test_cache_situations.py::", "src/qaxis/models/cache.py"
CACHE_FILE, HOLDING = "src/qaxis/models/cache_file.py", "src/qaxis/models/holding.py"
LAYERS_QUANTISED, SHARED = "src/qaxis/models/quantised.py", "src/qaxis/storage/shared.py"
IN_PLACE, QUANTISED = "src/qaxis/storage/in_place.py", "src/qaxis/storage/in_place_quantised.py"
MOMENTS, SUMMARY = "test_moments.py::", "src/qaxis/storage/summary.py"
PUT_BY_ROWS = "src/qaxis/attention/completed.py"
TRITON_MOMENTS = "src/qaxis/storage/triton_moments.py"
APPEND, APPEND_QUANTISED = "src/qaxis/storage/append.py", "src/qaxis/storage/append_quantised.py"
BOUNDS, PLACES, LAYERS_IN_PLACE = (
    "src/qaxis/storage/bounds.py",
    "src/qaxis/storage/window.py",
    "src/qaxis/models/in_place.py",
)
GENERATION, WINDOW = "test_generation.py::", "test_families.py::test_selection_stays_inside_the_window"
MODELS, ALWAYS, RECORDING = (
    "src/qaxis/models/attention.py",
    "src/qaxis/attention/always.py",
    "src/qaxis/models/recording.py",
)
DENSE, DECODING = "selfcheck/rivals/dense_decoding.py", "selfcheck/checks/decoding.py"
COMPLETING, STANDING_IN = "selfcheck/rivals/completing.py", "selfcheck/rivals/standing_in.py"
COMPLETION_SPEED = "selfcheck/checks/completion_speed.py"
SPEED, TIMING, HEADS = "selfcheck/checks/speed.py", "selfcheck/harness/timing.py", "selfcheck/inputs/heads.py"
GEMMA = "selfcheck/checks/gemma.py"
OWN, OBSERVING = "src/qaxis/measures/own_logits.py", "src/qaxis/models/observing.py"
ENABLE, SETTINGS = "src/qaxis/models/enable.py", "src/qaxis/models/settings.py"
LAYERS, SWITCHING, MASKS = "src/qaxis/models/layers.py", "src/qaxis/models/switching.py", "src/qaxis/models/masks.py"
MASKED = "src/qaxis/models/masked.py"
BUILDS = "test_enable.py::"

REPLAYING, REPLAYS = "src/qaxis/models/replaying.py", "test_replaying.py::"
CAPTURED, STATE = "src/qaxis/models/captured.py", "src/qaxis/models/model_state.py"
GENERATE, STAND_IN = "src/qaxis/models/generation.py", "src/qaxis/models/stand_in.py"
DECODE, PREFILL, SURROUNDINGS = "test_decode.py::", "test_prefill.py::", "test_surroundings.py::"
TAIL, TAIL_BOUND = "src/qaxis/attention/completion.py", "selfcheck/checks/completion_bound.py"
COMPLETED_PROMPTS, PUT_BACK = "test_prefill_completion.py::", "src/qaxis/prefill/triton_completed.py"
ROWS = "test_decode_rows.py::"
TRITON_ROWS = "test_triton_rows.py::"
EVIDENCE, TRACING = "selfcheck/harness/states.py", "selfcheck/harness/tracing.py"
RECORDS, KEEPING = "selfcheck/harness/records.py", "selfcheck/harness/keeping.py"
MACHINES, PRECAUTIONS = "test_machines.py::", "selfcheck/harness/surroundings.py"
ISOLATION, ISOLATED, TEX = "test_isolation.py::", "selfcheck/isolated.py", "paper/tex.py"
SUPPLY, LISTS = "test_supply.py::", "archive/requirements.py"
SBOM, LEFTOVERS = "archive/sbom.py", "selfcheck/harness/leftovers.py"
CERTIFIED, BY_CODES = "src/qaxis/decode/triton.py", "src/qaxis/decode/score_codes.cu"
COMPLETION, OF_MODELS, LINE = "test_completion.py::", "test_completion_models.py::", "src/qaxis/attention/completion.py"
ROUTING, STEPS = "src/qaxis/models/routing.py", "src/qaxis/models/decoding.py"
TOPK, TOPK_KERNEL = "test_topk.py::", "src/qaxis/ranking/topk.cu"
COMPLETED, COMPLETE = "test_decode_completion.py::", "src/qaxis/decode/complete.cuh"

MUTANTS = (
    # Which way attention goes
    Mutant("test_routes.py::test_every_refusal_is_told_once_and_whether_it_was_asked_for", "of two refusals one is told", "src/qaxis/models/routing.py", "    return tuple(dict.fromkeys((no_step, no_prompt)))", "    return (no_prompt,)"),
    Mutant("test_routes.py::test_a_step_knows_of_a_window_that_hides_nothing_yet", "a window that hides nothing yet is not told", MASKS, "told = local is not None and q_length == 1", "told = False and q_length == 1"),
    Mutant("test_routes.py::test_a_step_knows_of_a_window_that_hides_nothing_yet", "a compiled step sees no window", "src/qaxis/models/decoding.py", "    return Shown(pads, seen.window)", "    return Shown(pads)"),
    Mutant("test_masks.py::test_a_window_that_hides_nothing_yet_is_told", "what a chunk shows lasts", MASKS, "shown = Shown(offset=dropped, lasts=False)", "shown = Shown(offset=dropped)"),
    Mutant("test_routes.py::test_what_lasts_for_these_tokens_alone_is_no_step_to_be_repeated", "a step is repeated that sees what later ones do not", "src/qaxis/models/decoding.py", "shown is not None and shown.lasts else", "shown is not None else"),
    Mutant(ROWS + "test_no_engine_is_named_where_no_step_runs", "an engine is named that does not run", "src/qaxis/decode/api.py", '            raise RuntimeError(f"no decode step runs here: {why}; {error}") from error', '            return "reference", f"{why}; {error}"'),
    Mutant("test_triton_rows.py::test_what_is_not_allowed_is_named", "soft caps that prefill's kernels do not take", "src/qaxis/attention/logits.py", "LEAST_CAP, MOST_CAP = 1e-30, 1e30", "LEAST_CAP, MOST_CAP = 1e-30, 1e38"),
    Mutant("test_prefill_seen.py::test_logits_change_outputs_not_the_selection", "a strided sink is read as contiguous", "src/qaxis/prefill/attention.py", "else logits.sink[h].contiguous()", "else logits.sink[h]"),
    # What is left out, put back
    Mutant(COMPLETION + "test_what_a_window_dropped_is_counted", "groups begin with the first key that is left", LINE, "(self.begin + self.offset + GROUP - 1) // GROUP", "(self.begin + GROUP - 1) // GROUP"),
    Mutant(COMPLETION + "test_any_shape_is_what_double_precision_gives", "mass is put back from the middle of a run", LINE, "torch.where(visible, known - best[..., None], 0.0)", "torch.where(visible, known, 0.0)"),
    Mutant(COMPLETION + "test_the_mass_of_what_is_left_is_near_and_never_negative", "what rounding leaves of a mass may be negative", LINE, "-to_parts(less_mass)], -1)).clamp(min=0)", "-to_parts(less_mass)], -1))"),
    Mutant(COMPLETION + "test_sums_have_no_order", "parts are added as float32", LINE, "x.flatten(1).sum(1).float()", "canonical.tree_sum(x.flatten(1).float())"),
    Mutant(COMPLETION + "test_an_excess_that_leaves_float32_leaves_no_slope", "what is no number is a slope", LINE, "fine = (alpha.abs() * most + beta.abs() * most_cross).isfinite()", "fine = most == most"),
    Mutant(COMPLETION + "test_the_tail_is_relative_to_the_logit_of_the_highest_selected_score", "the tail is relative to the highest logit", "src/qaxis/attention/completed.py", "_top(picked, live, logits, head), fitted", "plain.top, fitted"),
    Mutant(COMPLETION + "test_keys_are_weighed_by_what_is_known_of_their_scores", "selected keys are taken out of the line by what is known of their scores", LINE, "apart = chosen.score * per_unit", "apart = chosen.known * per_unit"),
    Mutant(COMPLETION + "test_equal_scores_have_no_slope", "rounding has a slope", LINE, "torch.where(spread > fitted.second * LEAST_SPREAD, spread, 0.0)", "spread"),
    Mutant(COMPLETION + "test_a_mask_with_holes_is_refused", "a mask with holes is a range", LINE, "(allowed.sum(-1) == end - begin).all()", "(allowed.sum(-1) <= end - begin).all()"),
    Mutant(OF_MODELS + "test_what_a_window_dropped_counts_in_every_cache", "canonical groups begin with the window", ROUTING, "seen_of(allowed, dropped())", "seen_of(allowed, 0)"),
    Mutant(OF_MODELS + "test_padding_behind_a_window_is_a_range", "a mask does not tell what a window dropped", MASKS, "return None if known is None else ToldMask.of(known, dropped)", "return known"),
    Mutant("test_masks.py::test_what_a_window_dropped_is_told_whatever_is_made_of_a_mask", "what is made of a mask tells nothing", MASKS, "return out if func in get_default_nowrap_functions() else _telling(out, (args, kwargs))", "return out"),
    Mutant("test_masks.py::test_compiled_code_takes_masks", "asked what its memory is a view of, a mask never ends", MASKS, "return out if func in get_default_nowrap_functions() else", "return"),
    Mutant("test_masks.py::test_what_a_window_dropped_is_told_whatever_is_made_of_a_mask", "a copy of a mask tells nothing", MASKS, "return ToldMask.of(copy.deepcopy(self.as_subclass(torch.Tensor), memo), self.dropped)", "return copy.deepcopy(self.as_subclass(torch.Tensor), memo)"),
    Mutant("test_masks.py::test_what_a_window_dropped_is_told_whatever_is_made_of_a_mask", "the parts of a mask tell nothing", MASKS, "    if type(out) in (tuple, list):", "    if False:"),
    Mutant("test_masks.py::test_what_is_no_mask_of_these_keys_tells_nothing", "a sparse tensor is taken for a mask", MASKS, " and out.layout == torch.strided", ""),
    Mutant("test_masks.py::test_a_described_mask_lies_in_memory_as_transformers_would_have_it", "a described mask says that it is contiguous", MASKS, "cls, layout.shape, layout.stride(), layout.storage_offset(), dtype", "cls, layout.shape, dtype"),
    Mutant("test_masks.py::test_a_described_mask_lies_in_memory_as_transformers_would_have_it", "what shares a mask's memory leaves its description", MASKS, "        self.written.append(True)\n", ""),
    Mutant("test_masks.py::test_what_may_have_been_written_to_is_described_no_more", "a described mask ignores other memory", MASKS, "self.shared().data = values", "pass"),
    Mutant("test_masks.py::test_what_a_window_dropped_is_told_whatever_is_made_of_a_mask", "a saved mask cannot be loaded", MASKS, "torch.serialization.add_safe_globals([ToldMask])", ""),
    Mutant("test_masks.py::test_layers_that_get_the_last_queries_alone_get_their_mask", "layers that get the last queries alone get no mask of a whole text", MASKS, "q_length == kv_length and not _cuts_queries(kwargs.get(\"config\"))", "q_length == kv_length"),
    Mutant(OF_MODELS + "test_a_model_with_windows_is_compiled", "masks are made inside of what is compiled", MASKS, "@torch.compiler.disable(reason=\"a compiler cannot make tensors of kinds of our own; attention is not compiled either\")\n", ""),
    Mutant("test_masks.py::test_what_a_window_dropped_is_told_whatever_is_made_of_a_mask", "what is made of a described mask tells nothing", MASKS, "return _telling(func(*plains, **named), (args, kwargs))", "return func(*plains, **named)"),
    Mutant("test_masks.py::test_what_is_no_mask_of_these_keys_tells_nothing", "two masks that tell different numbers tell one", MASKS, " and all(x.dropped == told[0].dropped for x in told)", ""),
    Mutant("test_masks.py::test_the_last_queries_of_a_mask_are_described", "what was written to through the last queries is described", MASKS, "[] if of is None else of.written", "[]"),
    Mutant("test_masks.py::test_the_last_queries_of_a_mask_are_described", "a mask is made for its last queries", MASKS, "if (m := _last_queries(func, args, kwargs)) is not None:", "if (m := None) is not None:"),
    Mutant(OF_MODELS + "test_what_a_window_dropped_counts_where_a_model_cuts_its_masks", "a described mask tells of no window", MASKS, "        return self.described.offset", "        return 0"),
    Mutant(OF_MODELS + "test_how_many_tokens_a_window_dropped_is_told_or_refused", "a full window is taken for the whole text", MASKS, "window is None or n < window or m == n", "True"),
    Mutant(OF_MODELS + "test_refusals_are_told", "a token that cannot be completed is a prompt", ROUTING, "    if no_step.canonical:\n", "    if False:\n"),
    Mutant(OF_MODELS + "test_refusals_are_told", "a window over keys in full is completed as a step", STEPS, "    if holder.window or shown.window is not None:\n", "    if holder.window:\n"),
    Mutant(OF_MODELS + "test_canonical_tokens_take_the_moments_that_a_cache_keeps", "canonical tokens sum all groups anew", ROUTING, '"kept": _kept(q, k, v, seen)', '"kept": None'),
    Mutant(OF_MODELS + "test_canonical_tokens_take_the_moments_that_a_cache_keeps", "what is kept for canonical tokens counts padding", ROUTING, "holder.moments(pads)", "holder.moments()"),
    Mutant(OF_MODELS + "test_who_sees_other_groups_than_are_kept_sums_them", "a window is asked for moments", ROUTING, "or holder.window or", "or"),
    Mutant(OF_MODELS + "test_who_sees_other_groups_than_are_kept_sums_them", "what is kept serves whoever sees other groups", PUT_BY_ROWS, "self.kept[0] == (first, last)", "True"),
    Mutant(OF_MODELS + "test_moments_are_those_of_what_a_token_sees", "moments count padding", STEPS, "moments(_pads(held, shown))", "moments(None)"),
    Mutant(OF_MODELS + "test_while_a_step_is_captured_the_pads_are_the_graphs", "a graph has the pads of the token that was captured", STEPS, "return held.shared.pads if shown.pads is None and captured else shown.pads", "return shown.pads"),
    Mutant(OF_MODELS + "test_bitwise_takes_no_step_over_codes", "rounded scores pass for canonical ones", STEPS, 'settings.exactness == "bitwise" and held.index.codes is not None', "False"),
    Mutant(OF_MODELS + "test_what_is_no_step_is_not_captured", "a step in a window is captured, and fails", "src/qaxis/models/replaying.py", "if completed and any(cache.is_sliding):", "if False:"),
    Mutant(OF_MODELS + "test_each_head_and_token_keeps_what_a_tolerance_needs", "a model's heads forget the tolerance", ROUTING, "k_eff = backend.keys_of(settings.budget, q, keys, allowed, logits)", "k_eff = settings.budget.of(allowed)"),
    Mutant(OF_MODELS + "test_each_head_and_token_keeps_what_a_tolerance_needs", "a step is to keep to a tolerance, which its table does not have", STEPS, "if settings.budget.tolerance is not None:", "if False:"),
    Mutant(OF_MODELS + "test_each_head_and_token_keeps_what_a_tolerance_needs", "a prompt with a tolerance goes to matrix products", "src/qaxis/models/prompts.py", "if settings.budget.tolerance is not None:", "if False:"),
    Mutant(OF_MODELS + "test_strict_mode_refuses_what_nobody_asked_for", "strict mode takes a tolerance for an obstacle", "src/qaxis/models/attended.py", 'Refusal("a budget with a tolerance", asked=True)', 'Refusal("a budget with a tolerance")'),
    Mutant(OF_MODELS + "test_a_token_with_a_tolerance_is_not_captured", "a token with a tolerance is captured, and fails", "src/qaxis/models/replaying.py", "s.budget.tolerance is not None for s", "False for s"),
    Mutant(OF_MODELS + "test_names_and_room_are_checked", "kept keys may fill the budget of a completion", "src/qaxis/models/enable.py", 'completion == "none" or minimum > total', 'completion == "none" or minimum >= total'),
    # Caches in place: clock, rows, index, windows
    Mutant("test_rows.py::test_a_clock_moves_in_device_memory", "the clock moves on the host alone", "src/qaxis/storage/clock.py", "            self.tensor.fill_(end)\n", "            pass\n"),
    Mutant("test_rows.py::test_rows_are_those_of_a_plain_model", "rows see more than the window", "src/qaxis/decode/rows.py", "begin = torch.maximum(begin, end - window)", "pass"),
    Mutant("test_rows.py::test_rows_are_those_of_a_plain_model", "Triton's rows name tokens, not places", "src/qaxis/decode/rows_triton.py", "        end = end - first\n", "        pass\n"),
    Mutant("test_rows.py::test_fixed_rows_and_a_table_that_ends_early", "a table is read beyond its end", "src/qaxis/decode/rows_triton.py", "tl.minimum(end - begin, most)", "tl.minimum(end - begin, 49)"),
    Mutant("test_rows.py::test_rows_that_do_not_fit_are_named", "rows not checked", "src/qaxis/decode/rows.py", "    _check(out, clock, table, pads, window, places)\n", ""),
    Mutant("test_rows.py::test_a_window_keeps_enough_and_a_move_overwrites_nothing_it_reads", "a move overwrites what it reads", PLACES, "max(window, LEAST)", "LEAST"),
    Mutant("test_in_place.py::test_the_index_grows_to_what_one_made_anew_is", "an open group forgets its earlier tokens", BOUNDS, "        if low % GROUP:\n", "        if False:\n"),
    Mutant("test_in_place.py::test_the_index_grows_to_what_one_made_anew_is", "Triton: an open group forgets its earlier tokens", APPEND, "mask=(low < high) & (low > g * _GROUP), other=0.0", "mask=low < 0, other=0.0"),
    Mutant("test_in_place.py::test_the_index_grows_to_what_one_made_anew_is", "Triton: codes rounded towards zero", APPEND, "rounded = (x * power_of_two(-exponent) + _MAGIC) - _MAGIC", "rounded = (x * power_of_two(-exponent)).to(tl.int32).to(tl.float32)"),
    Mutant("test_in_place.py::test_every_width_and_layout", "last stride of new tokens ignored", APPEND, "new_m + d[None, :] * new_d, mask=fresh, other=0.0)\n    rows", "new_m + d[None, :], mask=fresh, other=0.0)\n    rows"),
    Mutant("test_in_place.py::test_room_grows_by_blocks_and_a_first_fit_is_exact", "room grows by what is needed", IN_PLACE, "max(LEAST, self.room // SHARE)", "0"),
    Mutant("test_in_place.py::test_what_is_not_a_number_gives_no_bound_that_is_too_small", "the bound of what is not a number is 0", "src/qaxis/arithmetic/fast_scores.py", "return torch.where(length <= LARGEST_NORM, bound, torch.inf)", "return torch.where(length <= LARGEST_NORM, bound, 0.0)"),
    Mutant("test_in_place.py::test_states_that_do_not_fit_are_named", "states of another dtype are appended", SHARED, 'require(x.dtype == dtype, f"{name}.dtype"', 'require(True, f"{name}.dtype"'),
    Mutant("test_in_place.py::test_a_window_keeps_its_newest_tokens_where_the_clock_says", "a full window is not moved", APPEND, "    if moved > 0:\n", "    if moved > 100000:\n"),
    Mutant("test_in_place.py::test_a_window_keeps_its_newest_tokens_where_the_clock_says", "bounds of what a window dropped stay", IN_PLACE, "        if first > before:\n            self.indexed = 0\n", "        if False:\n            self.indexed = 0\n"),
    Mutant("test_in_place_quantised.py::test_one_token_by_triton_is_what_quantising_at_once_gives", "first tokens widen scales in Triton", APPEND_QUANTISED, "tl.where((g == 0) & (place < sinks), sinks, place)", "place"),
    Mutant("test_in_place_quantised.py::test_one_token_by_triton_is_what_quantising_at_once_gives", "a complete group keeps the bound of its full numbers", APPEND_QUANTISED, "tl.store(norm + head, tl.maximum(longest, _longest_of", "tl.store(norm + head, tl.maximum(tl.load(norm + head), _longest_of"),
    Mutant("test_in_place_quantised.py::test_cropped_into_a_group_its_numbers_wait_again", "a crop leaves the bounds of what it dropped", QUANTISED, "            self.indexed = self.length - 1\n", "            pass\n"),
    Mutant("test_in_place_quantised.py::test_buffers_stay_where_they_are_unless_the_version_says_so", "buffers that moved are not told of", QUANTISED, "            self.shared.moved()\n\n    @torch", "            pass\n\n    @torch"),
    Mutant("test_in_place_quantised.py::test_what_is_not_finite_is_noted_on_a_gpu_and_refused_on_a_cpu", "NaN passes Triton unnoticed", APPEND_QUANTISED, "tl.store(broken, 1, mask=odd > 0)", "tl.store(broken, 1, mask=odd > 100)"),
    Mutant("test_in_place_quantised.py::test_formats_without_kernels_say_so_and_are_bounded", "float16 codes go to kernels that round them", QUANTISED, "eight and k.dtype in (torch.float32, torch.bfloat16)", "eight and k.dtype in (torch.float32, torch.bfloat16, torch.float16)"),
    Mutant("test_full_cache.py::test_turns_that_are_taken_back", "a window does not remember its past", LAYERS_IN_PLACE, "self.kv.refill(k, v, length)", "self.kv.crop(length)"),
    Mutant("test_full_cache.py::test_buffers_stay_where_they_are_unless_the_version_says_so", "reordering moves buffers", IN_PLACE, "            if chosen.shape == x.shape:\n                x.copy_(chosen)", "            if False:\n                x.copy_(chosen)"),
    Mutant("test_full_cache.py::test_work_space_of_rooms_that_no_layer_has_is_dropped", "work space of every room stays", SHARED, "            del self.workspace[key]\n", "            pass\n"),
    Mutant("test_full_cache.py::test_work_space_of_rooms_that_no_layer_has_is_dropped", "work space is dropped while a layer needs it", SHARED, "isinstance(key, tuple) and key[0] not in rooms", "isinstance(key, tuple)"),
    Mutant("test_rows.py::test_triton_and_python_agree_where_a_window_begins", "Triton: a window moves a token late", "src/qaxis/storage/triton_window.py", "tl.where(end <= places, 0,", "tl.where(end <= places + 1, 0,"),
    Mutant("test_full_cache.py::test_why_a_step_cannot_be_captured_is_said", "layers of different lengths are captured", CACHES, "if len({x.length for x in holders}) > 1", "if False"),
    Mutant("test_full_cache.py::test_why_a_step_cannot_be_captured_is_said", "a recurrent state beside keys is captured", CACHES, "    if not layer.savable:\n", "    if False:\n"),
    Mutant("test_full_cache.py::test_update_names_what_does_not_fit_and_changes_nothing", "states are not checked", HOLDING, "            self.kv.check(key_states, value_states, STATES)\n", ""),
    Mutant("test_full_cache.py::test_what_is_returned_says_what_holds_it_and_why_there_are_no_codes", "attention is not told what holds the keys", HOLDING, "        if self.told:\n", "        if False:\n"),
    Mutant("test_full_cache.py::test_wrong_arguments_and_files_are_named", "a file of another kind of cache is read", CACHE_FILE, 'require(hasattr(cache, "format") == ("format" in about),', "require(True,"),
    Mutant("test_cache_states.py::test_any_sequence_of_operations", "a crop leaves the bounds of what it dropped", IN_PLACE, "            bounds.restate(self.parts, self.length)\n", "            pass\n"),
    Mutant("test_cache_states.py::test_any_sequence_of_operations", "index rows do not follow the beams", IN_PLACE, "for name, x in list(self.parts.items()):\n            rows", "for name, x in [x for x in self.parts.items() if x[0] != 'norms']:\n            rows"),
    # What everything is installed from
    Mutant(SUPPLY + "test_every_list_has_the_versions_of_the_constraints", "a list has another version", "requirements/selfcheck.txt", "\ntokenizers==0.23.3", "\ntokenizers==0.23.2"),
    Mutant(SUPPLY + "test_records_made_with_a_list_are_not_stale", "a list has another version of what evidence names", "requirements/torch-cpu.txt", "\ntorch==2.13.0+cpu", "\ntorch==2.12.1+cpu"),
    Mutant(SUPPLY + "test_every_list_has_what_its_environment_asks_for", "lists not made anew after a change of pyproject.toml", "pyproject.toml", '"scipy>=1.15"', '"scipy>=1.19"'),
    Mutant(SUPPLY + "test_only_what_runs_the_library_needs_torch", "NVIDIA's libraries in an environment without CUDA", "requirements/lint.txt", "\nnumpy==2.2.6 ", "\nnvidia-cublas==2.2.6 "),
    Mutant(SUPPLY + "test_lists_name_no_index_and_no_folder", "a list names an index", "requirements/tex.txt", "# To be installed", "--index-url https://example.org/simple\n# To be installed"),
    Mutant(SUPPLY + "test_a_line_without_version_or_digest_is_named", "lines without a digest pass", LISTS, "if not digests or any(", "if any("),
    Mutant(SUPPLY + "test_every_install_is_by_hash_or_named_here", "installs without hashes", "noxfile.py", 'session.install("--require-hashes", *options', "session.install(*options"),
    Mutant(SUPPLY + "test_torch_is_the_cpu_build_where_an_index_has_one", "always the CUDA build", "noxfile.py", 'if "+cpu" in str(found)', "if False"),
    Mutant(SUPPLY + "test_gpu_evidence_has_its_own_versions_and_no_other_run_does", "tests of cuda take GPU evidence's versions", "noxfile.py", 'project(session, "tests")\n    # One', 'project(session, "tests", gpu=on_gpu(session))\n    # One'),
    Mutant(SUPPLY + "test_a_list_that_does_not_fit_a_machine_says_so", "no word on machines that have no wheel", "noxfile.py", "    except nox.command.CommandFailed:\n        session.error(", "    except nox.command.CommandFailed:\n        raise\n        session.error("),
    Mutant(SUPPLY + "test_cpu_builds_stay_where_their_index_is_out_of_reach", "CPU builds of another release kept", "requirements/lock.py", "not in before:\n            raise", "not in before:\n            pass"),
    Mutant(SUPPLY + "test_a_cpu_build_that_changed_on_its_index_stops", "CPU builds that changed on their index are taken", "requirements/lock.py", "if lost := sorted(", "if False and sorted("),
    Mutant(SUPPLY + "test_the_bill_of_materials_is_of_its_content", "a bill of materials with the time in it", SBOM, '    document["metadata"].pop("timestamp")\n', ""),
    Mutant(SUPPLY + "test_the_bill_of_materials_has_every_package_once", "a component says one environment only", SBOM, "for environment, _ in uses}", "for environment, _ in uses[:1]}"),
    Mutant(SUPPLY + "test_the_bill_of_materials_is_of_its_content", "one serial number for every content", SBOM, "uuid.uuid5(NAMESPACE, content)", 'uuid.uuid5(NAMESPACE, "")'),
    Mutant(SUPPLY + "test_leftovers_of_killed_runs_go_and_nothing_else", "what runs are using is removed", LEFTOVERS, " and _age(path) > OLD", ""),
    Mutant(SUPPLY + "test_leftovers_of_killed_runs_go_and_nothing_else", "the age of a folder is not that of its files", LEFTOVERS, "for x in (path, *inside))", "for x in (path,))"),
    Mutant(SUPPLY + "test_leftovers_of_killed_runs_go_and_nothing_else", "links are taken for leftovers", LEFTOVERS, " if not path.is_symlink()]", "]"),
    Mutant(SUPPLY + "test_leftovers_of_another_user_stay", "another user's folders are removed", LEFTOVERS, "if _is_ours(path) and ", "if "),
    # Losses, observing, threads
    Mutant("test_losses.py::test_losses_are_those_of_the_models_own_logits", "losses take the hidden states straight to the head", OWN, "logits = _logits(remembering(**arguments, logits_to_keep=torch.arange(start, stop)))", "logits = model.get_output_embeddings()(model.base_model(input_ids).last_hidden_state[:, start:stop])"),
    Mutant("test_losses.py::test_losses_are_those_of_the_models_own_logits", "layers run again for every slice", OWN, "            if i == len(returned):\n                returned.append(real(*args, **kwargs))\n", "            returned.append(real(*args, **kwargs))\n"),
    Mutant("test_losses.py::test_a_cache_is_written_once_and_read", "losses leave the cache out", OWN, 'arguments["past_key_values"] = cache', "pass"),
    Mutant("test_losses.py::test_whoever_changes_the_models_logits_is_heard", "hooks on the model ignored by losses", OWN, " or any(own.get(hooks) for hooks in _HOOKS)", ""),
    Mutant("test_losses.py::test_what_does_not_fit_is_named", "losses of a model in training mode", "src/qaxis/measures/perplexity.py", "any(module.training for module in model.modules())", "model.training"),
    Mutant("test_losses.py::test_a_model_in_float64_is_measured_in_float64", "float64 logits rounded", "src/qaxis/measures/perplexity.py", "logits if logits.dtype == torch.float64 else logits.float()", "logits.float()"),
    Mutant("test_recording.py::test_observing_changes_no_bit_of_any_family", "observed attention drops what SDPA does not know", OBSERVING, "return function(module, query, key, value, *args, **kwargs)", "return function(module, query, key, value, *args, **{n: x for n, x in kwargs.items() if n not in ('softcap', 's_aux')})"),
    Mutant("test_recording.py::test_observers_of_several_models_nest_and_leave_nothing", "observers see every model", OBSERVING, "if id(module) in modules:", "if True:"),
    Mutant("test_recording.py::test_observers_of_several_models_nest_and_leave_nothing", "look-up stays changed after observing", OBSERVING, "_look_up_watched if _observing else _look_up ", "_look_up_watched "),
    Mutant("test_recording.py::test_threads_that_share_a_model_are_recorded_and_judged_apart", "one count of calls for all threads", SETTINGS, "counts, thread = module.__dict__.setdefault(CALLS, {}), get_ident()", "counts, thread = module.__dict__.setdefault(CALLS, {}), 0"),
    Mutant("test_recording.py::test_a_thread_that_goes_around_is_found_while_others_do_not", "calls of another thread stand for a thread's own", SETTINGS, "return module.__dict__.get(CALLS, {}).get(get_ident(), 0)", "return sum(module.__dict__.get(CALLS, {}).values())"),
    Mutant("test_recording.py::test_a_pass_that_began_before_the_recording_is_left_out", "passes that began before a recording are timed", RECORDING, "if started is not None:", "if True:"),
    Mutant("test_recording.py::test_entropy_and_mass_are_float32_inside_autocast", "recording measures in autocast's dtype", RECORDING, "torch.autocast(call.query.device.type, enabled=False)", "torch.autocast(call.query.device.type, enabled=True)"),
    # Doors: what does not fit, any layout
    Mutant(DECODE + "test_any_layout", "last stride of the keys ignored", CERTIFIED, "j[:, None] * stride_kn + d[None, :] * stride_kd", "j[:, None] * stride_kn + d[None, :]"),
    Mutant(DECODE + "test_what_does_not_fit_is_named", "sizes not compared with the constructor's", "src/qaxis/decode/form.py", "require(q.shape[i] == size,", "require(True,"),
    Mutant("test_decode_cuda.py::test_any_layout", "what a kernel can read is asked once", "src/qaxis/decode/api.py", "if takes(q, k, v, index) else None", "if True else None"),
    Mutant(PREFILL + "test_what_does_not_fit_is_refused_by_name", "form of a prefill not checked", "src/qaxis/prefill/attention.py", "    check_qkv_form(q, k, v, causal=causal)\n", ""),
    Mutant("kernel-grid", "last strides ignored", "src/qaxis/storage/triton.py", "position * rows_n + d * rows_d, mask=mask", "position * rows_n + d, mask=mask"),
    Mutant("test_interpreter.py::test_triton_first_is_another_order_of_the_same", "Triton that came first stays compiled", "src/qaxis/arithmetic/interpreter.py", "        _interpret_what_is_loaded()", "        pass"),
    Mutant("test_interpreter.py::test_an_interpreter_that_is_chosen_after_triton_came_is_named", "Triton's own functions stay compiled, and nobody is told", "src/qaxis/arithmetic/triton.py", "    if calls_library and LOADED_TOO_EARLY:\n", "    if False:\n"),
    Mutant("test_interpreter.py::test_qaxis_first_and_nothing_in_the_environment", "interpreter not chosen", "src/qaxis/arithmetic/interpreter.py", 'os.environ["TRITON_INTERPRET"] = "1"', "pass"),
    # Surroundings: settings of torch, threads, tensors without memory
    Mutant(SURROUNDINGS + "test_scores_by_product_keep_their_bound", "scores by a float32 product", "src/qaxis/arithmetic/fast_scores.py", "torch.matmul(queries[some], keys)", "torch.matmul(queries[some].float(), keys.float())"),
    Mutant(SURROUNDINGS + "test_a_cache_goes_on_in_and_out_of_inference_mode", "buffers made in inference mode", "src/qaxis/storage/buffer.py", "    with torch.inference_mode(False):\n        return", "    if True:\n        return"),
    Mutant(SURROUNDINGS + "test_parts_are_joined_under_autocast_to_another_dtype", "parts joined by cat", "src/qaxis/storage/buffer.py", "    shape = list(parts[0].shape)\n", "    return torch.cat(parts, dim)\n    shape = list(parts[0].shape)\n"),
    Mutant(SURROUNDINGS + "test_threads_may_call_every_door_at_once", "interpreted kernels run together", RULES, "            with _INTERPRETER:\n", "            if True:\n"),
    Mutant(SURROUNDINGS + "test_what_a_cache_returns_cannot_be_written_to", "writes to a view are lost", "src/qaxis/storage/lazy.py", "ReadOnlyTensor, out) if is_view else out", "ReadOnlyTensor, out) if False else out"),
    Mutant(SURROUNDINGS + "test_tensors_that_no_kernel_could_read_are_refused", "tensors without memory pass", "src/qaxis/validation.py", "    if x.numel():\n        require(has_memory(x),", "    if False:\n        require(has_memory(x),"),
    Mutant(SURROUNDINGS + "test_scales_out_of_range_are_refused", "subnormal scales pass", "src/qaxis/validation.py", "LEAST_SCALE, MOST_SCALE = 2.0**-125", "LEAST_SCALE, MOST_SCALE = 2.0**-149"),
    Mutant(SURROUNDINGS + "test_what_is_dequantised_near_the_largest_number_is_finite", "codes beyond the largest number", QUANTIZATION, "return torch.floor(torch.full_like(scale, largest) / scale)", "return torch.full_like(scale, torch.inf)"),
    Mutant(SURROUNDINGS + "test_parts_of_a_cache_that_do_not_fit_are_named", "parts of a cache not checked", "src/qaxis/storage/side.py", "        self._check_parts(name)\n", ""),
    # What makes evidence stale
    Mutant(HARNESS + "test_the_claims_of_one_table_come_from_one_card", "a table of several cards passes", EVIDENCE, "if len(devices) > 1}", "if len(devices) > 9}"),
    Mutant(HARNESS + "test_a_claim_of_two_cards_speaks_of_those_with_fresh_evidence", "any card's record serves", EVIDENCE, 'next((r for r in records if card in r["device"]), None)', "next(iter(records), None)"),
    Mutant(HARNESS + "test_a_claim_of_two_cards_speaks_of_those_with_fresh_evidence", "a card that failed is passed over", EVIDENCE, 'state.word in ("stale", "missing")', 'state.word != "fresh"'),
    Mutant(HARNESS + "test_a_claim_of_two_cards_speaks_of_those_with_fresh_evidence", "a claim of which no card is fresh passes", EVIDENCE, 'any(s.word == "fresh" for s in others)', "True"),
    Mutant(HARNESS + "test_gpu_records_off_their_list_stay_beside_the_committed_ones", "records that are stale at once replace committed ones", KEEPING, " and not versions.outside(r, True, root)", ""),
    Mutant(HARNESS + "test_a_version_off_its_list_makes_only_its_records_stale", "versions play no part", EVIDENCE, "outside = versions.outside(record, state.on_gpu, root)", "outside: list[str] = []"),
    Mutant(HARNESS + "test_interpreted_kernels_and_the_constants_they_read_are_dependencies", "executed functions are not noted", TRACING, "    def ran() -> None:\n        RAN.add(where)", "    def ran() -> None:\n        set[str]().add(where)"),
    Mutant("test_paper.py::test_a_figure_of_other_evidence_is_refused", "figures of other evidence pass", "figures/drawn.py", "evidence.record_digest(records[claim]) != digest", "False"),
    # Certified decoding
    Mutant("certified", "what codes leave out is no error", CERTIFIED, "tl.load(residual_ptr) + relative", "relative"),
    Mutant("certified", "no error at all", CERTIFIED, "2.0 * (error * units * 1.01 + 1.0)", "0.0 * (error * units * 1.01 + 1.0)"),
    Mutant("certified", "keys without a fast score are dropped", CERTIFIED, "(fast >= cut) | (j < start)", "(fast >= cut) & (j >= start)"),
    Mutant("test_decode.py::test_codes_that_are_nearly_all_zero_are_ranked_by_both_parts_of_the_query", "the query's lower part is not used", CERTIFIED, "lower.to(tl.float32) * fine[None, :]", "lower.to(tl.float32) * 0.0"),
    Mutant("test_decode.py::test_ties_go_to_the_lower_position", "ties go to the higher position", CERTIFIED, "j = tl.load(position_ptr + offset + o,", "j = tl.load(position_ptr + total - 1 - offset - o,"),
    Mutant(TRITON_ROWS + "test_rows_see_and_keep_different_keys", "rows that keep fewer keys are padded with a position", CERTIFIED, "tl.full((OUT,), -1, tl.int64)", "tl.full((OUT,), 0, tl.int64)"),
    Mutant(TRITON_ROWS + "test_rows_see_and_keep_different_keys", "keys before the first visible one are candidates", CERTIFIED, "may & (j >= begin) & (j < end)", "may & (j < end)"),
    Mutant(TRITON_ROWS + "test_one_step_serves_a_growing_cache", "the last tokens are thought to have codes", KERNELS, "return end - end % SHARING", "return end"),
    Mutant(TRITON_ROWS + "test_what_is_always_kept_counts", "recent keys are not kept always", CERTIFIED, "tl.minimum(k_eff - oldest, recent)", "tl.minimum(k_eff - oldest, 0)"),
    Mutant(TRITON_ROWS + "test_what_is_always_kept_counts", "sinks are not kept always", CERTIFIED, "oldest = tl.minimum(k_eff, sinks)", "oldest = tl.minimum(k_eff, 0)"),
    Mutant(TRITON_ROWS + "test_soft_caps_and_sinks", "a sink is not in the maximum", CERTIFIED, "    if SINK:\n", "    if False:\n"),
    Mutant(TRITON_ROWS + "test_attention_over_given_keys", "a soft cap loses the sign", KERNELS, "((bits & 2147483647) | sign)", "(bits & 2147483647)"),
    Mutant(TRITON_ROWS + "test_attention_over_given_keys", "a sink weighs nothing", KERNELS, "        if SINK:\n", "        if False:\n"),
    Mutant(TRITON_ROWS + "test_launches_depend_on_the_room_and_not_on_the_length", "a grid for the codes there are", "src/qaxis/decode/triton_step.py", "triton.cdiv(self.n // size, t.codes_loop)", "triton.cdiv(c.scales.shape[2], t.codes_loop)"),
    # What speeds are measured with
    Mutant("test_rivals.py::test_dense_steps_of_ours_are_dense_attention", "stretches of keys overlap", DENSE, "end = tl.minimum(begin + span, n)", "end = n"),
    Mutant("test_rivals.py::test_dense_steps_of_ours_are_dense_attention", "a merged stretch counts twice", DENSE, "tl.where(s < SPLITS, tl.load(lse_ptr + part), -1e30)", "tl.load(lse_ptr + part)"),
    Mutant("test_rivals.py::test_dense_steps_of_ours_are_dense_attention", "first tokens are read from codes, too", "selfcheck/rivals/dense_8bit.py", "tl.where((at >= first)[None, :], tl.dot(turned", "tl.where((at >= 0)[None, :], tl.dot(turned"),
    Mutant("test_rivals.py::test_dense_ways_generate_the_same", "a dense graph attends to no new token", "selfcheck/rivals/dense_graph.py", "self.cache.at.add_(1)", "self.cache.at.add_(0)"),
    Mutant("test_rivals.py::test_only_dense_rivals_may_fail", "a way of ours that fails is left out", DECODING, "if name not in ways.IDEAL:", "if name == 'nothing':"),
    Mutant("test_rivals.py::test_steps_of_generate_are_compared_bit_for_bit", "canonical steps are not looked at", DECODING, "canonical += int(not torch.equal(plain.step(one), out.logits[i]))", "canonical += 0"),
    Mutant("test_rivals.py::test_a_slow_run_fails_nothing_and_a_bit_does", "a step with other bits passes", DECODING, "passed=not wrong and", "passed="),
    Mutant("test_rivals.py::test_a_ratio_is_to_the_fastest_dense_way_of_the_same_size", "ratios are to the slowest dense way", DECODING, 'return str(min(found, key=lambda r: r["ms"])["way"])', 'return str(max(found, key=lambda r: r["ms"])["way"])'),
    Mutant("test_rivals.py::test_every_target_is_of_values_that_are_measured_and_the_paper_says_which_are_met", "the best of several values meets a target", "paper/numbers.py", 'worst, sign = (min(found), r"$\\ge$")', 'worst, sign = (max(found), r"$\\ge$")'),
    Mutant("test_rivals.py::test_a_token_is_its_kernels_and_gaps", "gaps are not counted", "selfcheck/checks/timeline.py", "max(0.0, start - at)", "0.0"),
    Mutant("test_rivals.py::test_enable_as_documented_is_compared_with_the_reference", "rows of a prompt are not compared", "selfcheck/checks/enable.py", "int((off > NEAR).sum())", "0"),
    Mutant("test_completion_benchmark.py::test_every_completion_is_what_it_says", "a block of a completion has no mean before it is full", STANDING_IN, "return by_heads(full, self.means[:, : full.shape[-1]]) + own * last", "return by_heads(full, self.means[:, : full.shape[-1]])"),
    Mutant("test_completion_benchmark.py::test_every_completion_is_what_it_says", "a pooled slope knows a block that is not full", STANDING_IN, "for some, whole in runs(rows.first, rest.shape[2], size):\n            if whole:\n                q = rows.q[:, :, some]", "for some, whole in runs(rows.first - 1, rest.shape[2], size):\n            if whole:\n                q = rows.q[:, :, some]"),
    Mutant("test_completion_benchmark.py::test_a_line_from_moments_is_the_line_from_scores", "a line by moments forgets its mean score", COMPLETING, "excess = rest.mul_(near - mean)", "excess = rest.mul_(near)"),
    Mutant("test_completion_benchmark.py::test_stored_keys_and_values_are_those_of_decoding", "values of an open group are quantised", COMPLETING, "full.v[:, tokens] - layer.v[:, tokens]", "full.v[:, tokens] - full.v[:, tokens]"),
    Mutant("test_completion_benchmark.py::test_a_share_of_the_mass_is_kept_by_the_fewest_keys", "more keys than a share of the mass needs", "selfcheck/rivals/choosing_keys.py", "_least(weights, 1 - self.tolerance)", "_least(weights, 1 - self.tolerance / 2)"),
    Mutant("test_completion_curve.py::test_every_way_is_measured_and_priced", "keys by a tolerance are read for nothing", "selfcheck/checks/completion_curve.py", "return statistics.fmean(found)", "return 0.0"),
    Mutant("test_completion_curve.py::test_a_cost_that_the_line_does_not_lower_is_said", "a line that costs more passes", "selfcheck/checks/completion_curve.py", "line is not None and not line.percent < plain.percent", "line is not None and False"),
    Mutant("test_completion_benchmark.py::test_heads_of_a_group_keep_the_keys_with_most_of_their_weights_together", "weights of a group underflow", "selfcheck/rivals/choosing_keys.py", "return (near * scale).log_softmax(-1).logsumexp(1, keepdim=True)", "return (near * scale).softmax(-1).sum(1, keepdim=True)"),
    Mutant("test_completion_benchmark.py::test_heads_of_a_group_keep_the_keys_with_most_of_their_weights_together", "heads of a group choose by themselves", "selfcheck/rivals/choosing_keys.py", "ranked = near if scale is None else together(near, scale)", "ranked = near"),
    Mutant("test_completion_curve.py::test_every_way_is_measured_and_priced", "keys that heads share are read once each", "selfcheck/rivals/bytes_read.py", "readers = kv if rival.by_groups else heads", "readers = heads"),
    Mutant("test_completion_curve.py::test_every_way_is_a_point_of_the_figure_with_its_interval", "intervals are drawn upside down", "figures/completion.py", 'ends = [[r["change"] - r["low"] for r in rows], [r["high"] - r["change"] for r in rows]]', 'ends = [[r["high"] - r["change"] for r in rows], [r["change"] - r["low"] for r in rows]]'),
    Mutant("test_completion_benchmark.py::test_a_run_goes_on_where_it_was", "what was measured is measured again", "benchmarks/completion.py", "missing = [plan for plan in plans if plan.name not in record[\"ways\"]]", "missing = list(plans)"),
    Mutant("test_completion_benchmark.py::test_the_report_pairs_articles_and_says_what_is_missed", "the lower upper end meets a target", "benchmarks/completion_report.py", "high = max(found.high, found.t_high)", "high = min(found.high, found.t_high)"),
    Mutant("test_speed.py::test_every_graph_is_replayed_once_a_round_after_each_flush_that_it_asks_for", "every replay follows the same flush", TIMING, "before[kind]()", "before[WRITTEN]()"),
    Mutant("test_speed.py::test_every_graph_is_replayed_once_a_round_after_each_flush_that_it_asks_for", "the flush is timed, too", TIMING, "            before[kind]()\n            start.record()\n", "            start.record()\n            before[kind]()\n"),
    Mutant("test_speed.py::test_one_flush_writes_and_the_other_only_reads", "the clean flush writes", TIMING, "CLEAN: read.amax", "CLEAN: read.zero_"),
    Mutant("test_speed.py::test_one_flush_writes_and_the_other_only_reads", "what was just overwritten is read", TIMING, "CLEAN: read.amax", "CLEAN: written.amax"),
    Mutant("test_speed.py::test_a_ratio_has_the_interval_of_rounds_that_are_resampled_together", "rounds are resampled apart", TIMING, "paired=True", "paired=False"),
    Mutant("test_speed.py::test_a_ratio_has_the_interval_of_rounds_that_are_resampled_together", "the fastest has the smallest mean", TIMING, "key=lambda name: statistics.median(times[name])", "key=lambda name: statistics.mean(times[name])"),
    Mutant("test_speed.py::test_kinds_of_keys_are_what_they_are_called", "correlated queries share too much", HEADS, "math.sqrt(COSINE) * shared", "COSINE * shared"),
    Mutant("test_speed.py::test_kinds_of_keys_are_what_they_are_called", "uneven queries are not divided", HEADS, "grouped / size[:, None]", "grouped * 1"),
    Mutant("test_speed.py::test_ratios_are_to_the_fastest_dense_step_after_the_same_flush", "clean ratios are of dense steps that write back", SPEED, 'dense, coded = self.of(way, flush)["all"], self.of("dense", flush)', 'dense, coded = self.of(way, flush)["all"], self.of("dense", WRITTEN)'),
    Mutant("test_speed.py::test_ratios_are_to_the_fastest_dense_step_after_the_same_flush", "outputs of other keys may differ", SPEED, "exact = all(way.exact for x in found for way in x.ways)", "exact = all(way.exact for x in found[:1] for way in x.ways)"),
    Mutant("test_speed.py::test_a_prefill_is_compared_at_every_length", "long prompts may differ", SPEED, "passed=wrong == 0,", "passed=found[0].wrong == 0,"),
    Mutant("test_speed.py::test_the_paper_has_intervals_flushes_and_kinds", "the paper's clean ratios are the others", "paper/numbers.py", "{_within(r)} & {_within(r[CLEAN])}", "{_within(r)} & {_within(r)}"),
    Mutant("test_speed.py::test_a_dense_step_is_off_by_a_share_of_what_is_right", "a dense step may give nothing", DENSE, " / right.float().abs().max()\n", "\n"),
    Mutant("test_speed.py::test_a_package_that_fails_or_is_wrong_is_left_out_and_said", "a package's wrong step breaks the claim", DENSE, "add(name, step, foreign=True)", "add(name, step)"),
    Mutant("test_speed.py::test_what_cannot_be_captured_is_left_out_and_something_has_to_be_left", "ratios to no dense step", DENSE, "    if not graphs:\n", "    if False:\n"),
    Mutant("test_speed.py::test_real_keys_are_counted_by_the_step_that_runs", "the Triton step's count stands for CUDA's", "selfcheck/checks/survivors.py", 'if way == "codes":', 'if way == "codes" and by == "Triton":'),
    Mutant("test_optional.py::test_a_part_that_differs_or_is_missing_is_named", "an optional subject is not verified", "selfcheck/inputs/optional.py", 'if actual != subject["sha256"]:', "if False:"),
    Mutant("test_optional.py::test_a_claim_without_its_subject_is_not_run", "a missing subject is not noticed", GEMMA, "if optional.missing(subject):", "if False:"),
    Mutant("test_optional.py::test_anything_wrong_with_a_second_model_fails_its_claim", "a text within the window serves", GEMMA, "passed=passed and ids.shape[1] > window", "passed=passed"),
    Mutant("test_optional.py::test_a_second_model_whose_enabling_changes_nothing_or_too_much_fails", "enabling that changes nothing passes", GEMMA, 'return float("inf")', "pass"),
    # The CUDA C++, emulated
    # What rows see and keep
    Mutant(ROWS + "test_rows_see_what_they_say", "keys that a row does not see are ranked", "src/qaxis/decode/score_keys.cu", "(u32)(j + c - seen.start) < (u32)(seen.stop - seen.start);", "true;"),
    Mutant(ROWS + "test_rows_see_what_they_say", "codes of keys that a row does not see are ranked", "src/qaxis/decode/score_codes.cu", ">= (u32)(seen.stop - seen.start)) place = 0;", ">= 0x7fffffffu) place = 0;"),
    Mutant(ROWS + "test_rows_never_lead_beyond_the_room", "rows are trusted blindly", "src/qaxis/decode/seen.cuh", "max(0, min(rows[4 * b + 1], room.n))", "max(0, min(rows[4 * b + 1], room.n + 40))"),
    Mutant("test_decode_cuda.py::test_counts_that_mislead_cost_time_and_no_key", "a step leaves its counts behind", "src/qaxis/decode/choice.cuh", "tally[(i64)p.row * TALLY + i] = 0;", "tally[(i64)p.row * TALLY + i] += 0;"),
    Mutant("test_decode_cuda.py::test_fast_scores_are_off_by_no_more_than_they_say", "what codes leave out is no error of a place", BY_CODES, "others[p] + each_off[p] * (scaled", "others[p] + 0.0f * (scaled"),
    Mutant("test_decode_cuda.py::test_uneven_channels_do_not_make_more_candidates", "one length for channels of all sizes", "src/qaxis/decode/cuda.py", "    scaled = index.scaled_residuals\n    if scaled is None:", "    scaled = None\n    if scaled is None:"),
    Mutant("test_decode_cuda.py::test_scaled_residuals_that_do_not_fit_are_named", "scaled residuals not checked", "src/qaxis/storage/key_index.py", "        if self.scaled_residuals is not None:\n", "        if self.scaled_residuals is None:\n"),
    Mutant(MOMENTS + "test_whatever_happens_they_are_those_made_anew", "moments of what was cropped", IN_PLACE, "        self.summary.cut(self.length, length)\n", ""),
    Mutant(MOMENTS + "test_whatever_happens_they_are_those_made_anew", "moments of what was cropped from codes", QUANTISED, "        self.summary.cut(self.length, length)\n", ""),
    Mutant(MOMENTS + "test_whatever_happens_they_are_those_made_anew", "moments of what was refilled", IN_PLACE, "        self.summary.restart()\n", ""),
    Mutant(MOMENTS + "test_a_launch_follows_the_clock_alone", "moments of what was taken back", SHARED, "            holder.summary.cut(holder.length, length)\n", ""),
    Mutant(MOMENTS + "test_whatever_happens_they_are_those_made_anew", "moments stay with their rows", QUANTISED, "        self.summary.select(indices)\n", ""),
    Mutant(MOMENTS + "test_rows_that_change_places_take_along_what_they_counted", "rows change places without what they counted", SUMMARY, "            for to, x in zip((*self.moments, self.state), chosen, strict=True):\n", "            for to, x in zip(self.moments, chosen[:2], strict=True):\n"),
    Mutant(MOMENTS + "test_every_width_and_dtype", "a group that padding begins in counts", SUMMARY, "pads // GROUP + (pads % GROUP > 0).int()", "pads // GROUP"),
    Mutant(MOMENTS + "test_groups_that_change_when_more_of_them_are_quantised_are_added_anew", "groups that change are not added anew", SUMMARY, "        if not holder.lasting:\n", "        if False:\n"),
    Mutant(MOMENTS + "test_a_copy_goes_on_by_itself_and_modes_of_torch_change_nothing", "moments made in inference mode", SUMMARY, "        with torch.inference_mode(False):\n            products", "        if True:\n            products"),
    Mutant("test_imports.py::test_no_module_is_imported_by_what_it_imports", "a circle of imports, for types alone", SUMMARY, "from .side import Stored\n", "from .side import Stored\n\nif False:\n    from .shared import Holder\n"),
    Mutant("test_imports.py::test_folders_import_what_is_drawn", "storage takes from attention", SUMMARY, "from .side import Stored\n", "from .side import Stored\n\nif False:\n    from ..attention.logits import Logits\n"),
    Mutant(MOMENTS + "test_every_width_and_dtype", "Triton: halves are added, not neighbours", TRITON_MOMENTS, "tl.sum(tl.reshape(products, (TOKENS >> (level + 1), 2, ROWS, COLUMNS)), 1)", "tl.sum(tl.reshape(products, (2, TOKENS >> (level + 1), ROWS, COLUMNS)), 0)"),
    Mutant(MOMENTS + "test_however_many_tokens_the_kernel_takes_at_once", "Triton: the first half of a group twice", TRITON_MOMENTS, "t + half * (TOKENS // 2), end", "t, end"),
    Mutant(MOMENTS + "test_every_width_and_dtype", "Triton: sums are those of every tile", TRITON_MOMENTS, "mask=(row < x_dim) & sums_too", "mask=row < x_dim"),
    Mutant(MOMENTS + "test_a_launch_follows_the_clock_alone", "Triton: pads that change are not seen", TRITON_MOMENTS, "    if (counted != begin) | (done < end):\n", "    if (counted < 0) | (done < end):\n"),
    Mutant("test_in_place.py::test_the_index_grows_to_what_one_made_anew_is", "a group is scaled by its scales, not by their roots", "src/qaxis/storage/bounds.py", "over_roots(left_out, exponents, GROUP)", "over_roots(left_out, exponents * 2, GROUP)"),
    Mutant(ROWS + "test_rows_of_any_shape", "ranks beyond the first turn are left out", "src/qaxis/decode/attend.cuh", "for (int c = 0; c < p.turns; c++) {", "for (int c = 0; c < 1; c++) {"),
    Mutant(ROWS + "test_the_highest_score_is_one_of_a_key_that_is_kept", "a key that is not kept sets the highest score", "src/qaxis/decode/program.cuh", "return !FORCED || forced(j) || ranked() > 0;", "return true;"),
    Mutant(ROWS + "test_soft_caps_and_sinks_have_the_bits_of_the_reference", "a sink has no weight", "src/qaxis/decode/attend.cuh", "if (sinks) w[0] = __fadd_rn(w[0], sink);", ""),
    Mutant(ROWS + "test_what_is_launched_does_not_depend_on_how_many_tokens_there_are", "one token has no stride", "src/qaxis/cuda/compiler.py", "tokens = tokens if tokens < MOST_TOKEN_STRIDE else 0", "tokens = tokens if x.shape[2] > 1 else 0"),
    Mutant(ROWS + "test_what_is_launched_does_not_depend_on_how_many_tokens_there_are", "a part without tokens has no address", "src/qaxis/cuda/compiler.py", "    if x.numel():\n        return x\n", "    return x\n"),
    Mutant("test_ends_of_float32.py::test_fast_scores_stay_within_their_bound_at_the_ends_of_float32", "queries too short for a length have a range", "src/qaxis/decode/tally.cuh", " && norm_q > SHORTEST ?", " ?"),
    Mutant("test_ends_of_float32.py::test_a_prompt_whose_queries_are_too_short_for_a_length", "the same in Triton", "src/qaxis/arithmetic/triton.py", " & (norm_q > _SHORTEST)", ""),
    Mutant("test_ends_of_float32.py::test_a_query_that_leaves_float32_under_the_scales_of_a_cache", "a query is split for any scale", BY_CODES, "fabsf(x) * fmaxf(step[e], LEAST_CODE_SCALE)", "fabsf(x) * step[e]"),
    Mutant("test_decode_cuda.py::test_a_step_has_the_canonical_bits", "a run in eight is overlooked", "src/qaxis/decode/candidates.cuh", "if (best >= least) bits |= 1u << e;", "if (best >= least && e != 3) bits |= 1u << e;"),
    Mutant("test_launching.py::test_a_launch_says_all_and_that_it_may_be_early", "no launch is early", "src/qaxis/cuda/launching.py", "_Attribute(id=_SERIALIZATION, value=1)", "_Attribute(id=_SERIALIZATION, value=0)"),
    Mutant("test_launching.py::test_the_second_kernel_of_a_step_waits_before_it_reads_what_the_first_wrote", "the second kernel does not wait", "src/qaxis/decode/choose.cu", "    await_previous();\n", ""),
    Mutant("test_launching.py::test_numbers_that_python_shares_with_the_kernels_are_the_same", "a number of the kernels is another in Python", "src/qaxis/decode/cuda.py", "BLOCK, NEAR, MARKS = 512, 112, 13", "BLOCK, NEAR, MARKS = 512, 112, 14"),
    Mutant("test_topk_claims.py::test_what_replays_leave_is_looked_at", "what replays wrote is not looked at", "selfcheck/checks/topk_speed.py", ' + _others(kept[row["way"]][-1], right, order)', ""),
    Mutant("native", "no error behind codes", "src/qaxis/decode/counts.cuh", "(int)floorf(place - off)", "(int)floorf(place + 0.0f * off)"),
    Mutant("native", "keys without a code are dropped", "src/qaxis/decode/candidates.cuh", "may[u] = between(key[u], p.begin, p.end) & ~scored[u];", "may[u] = 0;"),
    # The step with completion
    Mutant(COMPLETED + "test_rows_are_completed", "keys that were chosen at the edge are left too", "src/qaxis/decode/choice.cuh", "            tail.take_winner(parts, s.winner[i], s.winner_word[i]);\n", ""),
    Mutant(COMPLETED + "test_rows_are_completed", "what a program has is told to itself alone", "src/qaxis/decode/tail.cuh", "        if (p.lane >= CLUSTER) return;", "        if (p.lane != p.rank) return;"),
    Mutant(COMPLETED + "test_powers_of_two_at_most_one_have_the_canonical_bits", "a power far below the others is not cut off", "src/qaxis/decode/run.cuh", "    return product_in_unit(__uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23)), DOWN);", "    return __fmul_rn(__uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23)), DOWN);"),
    Mutant(COMPLETED + "test_rows_are_completed", "of a thread that has several runs the first counts alone", "src/qaxis/decode/tail.cuh", "for (int v = 1; v < DEEP; v++) sums[v - 1] = sums[v], bests[v - 1] = bests[v];", "for (int v = 1; v < DEEP; v++) sums[v - 1] = make_uint2(0, 0);"),
    Mutant(COMPLETED + "test_runs_of_any_shape_are_summed_where_keys_are_scored", "a run's sums have its last keys twice", "src/qaxis/decode/score_keys.cu", "held[k][i] = held[k + 1][i];", "held[k][i] = any;"),
    Mutant(COMPLETED + "test_rows_are_completed", "a quarter of a run is left out", "src/qaxis/decode/run.cuh", "if (u == 1) half[x] = two;", "if (u == 0) half[x] = two;"),
    Mutant(COMPLETED + "test_rows_are_completed", "a place is half a place too high", "src/qaxis/decode/tail.cuh", "known.half = -0.5f * known.unit;", "known.half = 0.0f;"),
    Mutant(COMPLETED + "test_a_row_without_units_has_canonical_scores", "places of a row without units are scores", "src/qaxis/decode/tail.cuh", "else known.start = known.stop = p.end;", "else known.start = p.start;"),
    Mutant(COMPLETED + "test_soft_caps_and_sinks", "a completed step's sink has no weight", COMPLETE, "    if (sinks) w[0] = __fadd_rn(w[0], logits.power(logits.sink, top));\n", ""),
    Mutant(COMPLETED + "test_rows_are_completed", "words of keys without a code are not kept", "src/qaxis/decode/tail.cuh", "if (!known.is_placed(p.position[i])) words", "if (false) words"),
    Mutant(COMPLETED + "test_rows_are_completed", "a group that is cut off counts", "src/qaxis/decode/line.cuh", "(seen.begin + 127) / 128", "seen.begin / 128"),
    Mutant(COMPLETED + "test_scores_that_hardly_differ_have_no_slope", "rounding is taken for a slope", COMPLETE, "spread > __fmul_rn(all.second, 0x1p-12f) && ", ""),
    Mutant(COMPLETED + "test_triton_refuses_by_name", "a step that Triton runs is not completed, and nobody is told", "src/qaxis/decode/api.py", '            if kind != "none":\n                why', '            if False:\n                why'),
    Mutant(COMPLETED + "test_what_is_not_allowed_is_named", "no key need be ranked", "src/qaxis/decode/asked.py", "    require(sum(always) < ranked,", "    require(True,"),
    Mutant("native", "near keys are not ordered by position", "src/qaxis/decode/choice.cuh", "s.near_position[o] < j", "s.near_position[o] > j"),
    Mutant("native", "a sum over neighbours in another order", "src/qaxis/arithmetic/canonical.cuh", "for (int s = 1; s < n; s *= 2)", "for (int s = n / 2; s > 0; s /= 2)"),
    Mutant("native", "lists that overflow are used as they are", "src/qaxis/decode/edge.cuh", "sure &= pull(&s.full, r) == 0;", "sure &= pull(&s.full, r) >= 0;"),
    Mutant("prefill", "keys below the threshold are surely in", "src/qaxis/prefill/select.cu", "min(cut.behind + error, TOP)", "max(cut.behind - 40 * error, 1)"),
    Mutant("prefill", "ties of the band go to the higher position", "src/qaxis/prefill/triton.py", "(by_j[None, :] < j[:, None])", "(by_j[None, :] > j[:, None])"),
    Mutant("prefill", "ties of select.cu's band go to the higher position", "src/qaxis/prefill/select.cu", "position[other] < j", "position[other] > j"),
    Mutant("test_prefill_seen.py::test_triton_selects_the_same_from_rows_of_many_blocks", "Triton: keys before the first that is ranked are ranked", "src/qaxis/prefill/triton.py", "tl.where((j >= lo) & (j < hi), fast, -1)", "tl.where(j < hi, fast, -1)"),
    Mutant("test_prefill_seen.py::test_triton_selects_the_same_from_rows_of_many_blocks", "Triton: keys behind the last that is ranked are ranked", "src/qaxis/prefill/triton.py", "tl.where((j >= lo) & (j < hi), fast, -1)", "tl.where(j >= lo, fast, -1)"),
    Mutant("test_prefill_seen.py::test_triton_selects_the_same_from_rows_of_many_blocks", "Triton: of eight keys one may be in the band", "src/qaxis/prefill/triton.py", "left -= lowest", "left = left * 0"),
    Mutant("test_prefill_seen.py::test_triton_selects_the_same_from_rows_of_many_blocks", "Triton: sums of a band over other pairs", RULES, "tl.sum(tl.reshape(x, (ROWS, N >> (level + 1), 2)), 2)", "tl.sum(tl.reshape(x, (ROWS, 2, N >> (level + 1))), 1)"),
    Mutant("test_prefill_seen.py::test_the_selection_is_that_of_what_is_seen", "Triton: padding is seen", "src/qaxis/prefill/triton.py", "begin = tl.maximum(begin, tl.load(pads_ptr + b) - origin)", "begin = tl.maximum(begin, 0)"),
    Mutant("test_prefill_seen.py::test_the_selection_is_that_of_what_is_seen", "select.cu: padding is seen", "src/qaxis/prefill/select.cu", "is_padded ? pads[b] - origin : 0", "0"),
    Mutant("test_prefill_seen.py::test_the_selection_is_that_of_what_is_seen", "a window of one key too many", "src/qaxis/prefill/triton.py", "begin = tl.maximum(end - window, 0)", "begin = tl.maximum(end - window - 1, 0)"),
    Mutant("test_prefill_seen.py::test_the_selection_is_that_of_what_is_seen", "select.cu: keys before the first that is seen are ranked", "src/qaxis/prefill/select.cu", "word[p] &= hidden >= 2 * p + 2 ? 0u : hidden == 2 * p + 1 ? 0xffff0000u : ~0u;", ""),
    Mutant("test_prefill_seen.py::test_what_is_always_kept_counts", "sinks are ranked like others", "src/qaxis/prefill/triton.py", "    lo = tl.minimum(begin + sinks, end)\n", "    lo = tl.minimum(begin, end)\n"),
    Mutant("test_prefill_seen.py::test_what_is_always_kept_counts", "select.cu: bits of what is always kept are not set", "src/qaxis/prefill/select.cu", "if (some_always) chosen |= bits_between(begin, lo, w) | bits_between(hi, end, w);", ""),
    Mutant("test_prefill_seen.py::test_a_key_that_is_not_ranked_does_not_decide_the_scale_of_the_softmax", "a long key that is not kept decides the scale of the softmax", "src/qaxis/prefill/triton.py", "kept = seen & (ranks | (j < lo) | (j >= hi))", "kept = seen"),
    Mutant("test_prefill_seen.py::test_keys_of_any_length_are_in_canonical_order", "long keys keep the scores of a range that they leave", "src/qaxis/prefill/triton.py", "tl.uint16), mask=seen)", "tl.uint16), mask=seen & (j < 0))"),
    Mutant("test_prefill_seen.py::test_keys_of_any_length_are_in_canonical_order", "products of very long keys are taken for their scores", "src/qaxis/prefill/triton_attend.py", " | (of_long >= 1.0)", ""),
    Mutant("test_prefill_seen.py::test_keys_of_any_length_are_in_canonical_order", "a wide band takes one tie too many", "src/qaxis/prefill/triton.py", "(earlier < missing - above)", "(earlier <= missing - above)"),
    Mutant("test_prefill_seen.py::test_one_long_key_leaves_the_bands_as_they_are", "no key is long", "src/qaxis/prefill/attention.py", "_LONG = 2.0", "_LONG = 1e9"),
    Mutant("test_prefill_seen.py::test_a_team_of_warps_selects_the_same", "select.cu: scores that are read anew are not masked", "src/qaxis/prefill/select.cu", "return c == 0 || c == blocks - 1 ? ranked(four, c) : four;", "return four;"),
    Mutant("test_prefill_seen.py::test_logits_change_outputs_not_the_selection", "sinks are left out of the softmax", "src/qaxis/prefill/triton_attend.py", "weight = tl.exp2(sink - behind)", "weight = weight * 1.0"),
    Mutant(COMPLETED_PROMPTS + "test_what_is_left_out_is_put_back", "a prompt: what is selected is put back as well", PUT_BACK, "(j < seen_to[:, None]) & (chosen == 0)", "(j < seen_to[:, None])"),
    Mutant(COMPLETED_PROMPTS + "test_what_is_left_out_is_put_back", "a prompt: what is selected has an affine weight beside its own", PUT_BACK, "(j < fitted_to[:, None]) & (chosen == 0)", "(j < fitted_to[:, None])"),
    Mutant(COMPLETED_PROMPTS + "test_where_every_complete_group_is_kept_nothing_is_put_back", "a prompt: mass is added that no value stands for", PUT_BACK, "tl.where(many > 0, mass, 0.0)", "tl.where(many >= 0, mass, 0.0)"),
    Mutant(COMPLETED_PROMPTS + "test_groups_lie_inside_what_a_query_sees", "a prompt: a group that padding cuts counts", PUT_BACK, "first = (begin + shift + _GROUP - 1) // _GROUP", "first = (begin + shift) // _GROUP"),
    Mutant(COMPLETED_PROMPTS + "test_groups_count_from_the_first_token_of_a_window", "a prompt: groups count from the first key that is there", "src/qaxis/prefill/attention.py", "(plan.offset + stretch.origin) % GROUP", "stretch.origin % GROUP"),
    Mutant(COMPLETED_PROMPTS + "test_the_spread_is_right_where_all_scores_are_large", "a prompt: squares of scores, not of distances, are summed", PUT_BACK, "        usual = _usual_of(", "        usual = 0.0 * _usual_of("),
    Mutant(COMPLETED_PROMPTS + "test_scores_that_hardly_differ_have_no_slope", "a prompt: a slope along what is rounding", PUT_BACK, "sloped = spread > second * _LEAST_SPREAD", "sloped = spread > 0.0"),
    Mutant(COMPLETED_PROMPTS + "test_a_few_keys_left_of_complete_groups_carry_all_that_is_left", "a prompt: a few scores that lie close together are compared with each other alone", PUT_BACK, "tl.where(of_group, score * score, 0.0)", "tl.where(fitted, score * score, 0.0)"),
    Mutant(COMPLETED_PROMPTS + "test_a_few_keys_left_of_complete_groups_carry_all_that_is_left", "masked: a few scores that lie close together are compared with each other alone", LINE, "torch.where(groups, scores, 0.0).square()", "torch.where(fitted, scores, 0.0).square()"),
    Mutant(COMPLETED_PROMPTS + "test_masked_attention_keeps_to_a_tolerance", "masked: a tolerance is not looked at", MASKED, "k_eff = backend.keys_of(budget, q[:, :, rows], k, mask, logits)\n            mask = select", "k_eff = budget.of(mask)\n            mask = select"),
    Mutant(COMPLETED_PROMPTS + "test_masked_attention_keeps_to_a_tolerance", "masked: beside what is always kept a tolerance is not looked at", MASKED, "k_eff = backend.keys_of(budget, q[:, :, rows], k, mask, logits)\n            indices", "k_eff = budget.of(mask)\n            indices"),
    Mutant(COMPLETED_PROMPTS + "test_what_does_not_fit_is_refused_by_name", "a prompt: a tolerance is ignored", "src/qaxis/prefill/attention.py", "require(tolerance is None, ", "require(True, "),
    Mutant(COMPLETED_PROMPTS + "test_shares_below_the_smallest_float16_are_put_back", "a prompt: shares below float16's smallest number are lost", PUT_BACK, "tl.where(many > 0, _ROOM / largest, 1.0)", "tl.where(many > 0, 1.0, 1.0)"),
    Mutant(COMPLETED_PROMPTS + "test_masked_attention_is_completed", "masked: groups count from the first key that is there", MASKED, "seen = seen_of(visible, offset)", "seen = seen_of(visible)"),
    Mutant(COMPLETED_PROMPTS + "test_what_does_not_fit_is_refused_by_name", "a prompt: no key is kept by its score", "src/qaxis/prefill/form.py", "sum(always) < budget.minimum", "sum(always) <= budget.minimum"),
    Mutant("test_prefill_seen.py::test_windows_of_later_stretches_have_an_origin_of_their_own", "bits of a stretch handed over from its first word on", "src/qaxis/prefill/attention.py", "slice(stretch.start, stretch.start + stretch.rows), stretch.origin // 32", "slice(stretch.start, stretch.start + stretch.rows), 0"),
    Mutant("prefill", "one key too few of the list", "src/qaxis/prefill/select.cu", "if (better < missing)", "if (better < missing - 1)"),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-2-512-1-64-200]", "lists that overflow are used as they are", TOPK_KERNEL, "fits = fits && theirs <= capacity", "fits = fits && theirs >= 0"),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-2-512-1-4096-3]", "too short a list is used as it is", TOPK_KERNEL, "how == BEST_LISTED && reach >= k", "how == BEST_LISTED"),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-2-512-1-4096-200]", "ties of a program before are not counted", TOPK_KERNEL, "cut.needed - over_programs(&s.tied).before", "cut.needed - 0"),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-2-512-1-4096-200]", "programs write over each other", TOPK_KERNEL, "return over_programs(&s.chosen).before;", "return 0;"),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-2-512-1-4096-200]", "one tie too many of a list", TOPK_KERNEL, "lists.rank(lists.place[i]) >= taken", "lists.rank(lists.place[i]) > taken"),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-1-512-2-0-0]", "ties of a row that is read again are forgotten from chunk to chunk", TOPK_KERNEL, "ties_before = ties_after;", ""),
    Mutant(TOPK + "test_no_plan_changes_the_selection[16400-500-2-512-1-64-200]", "the sample decides whatever is above it", TOPK_KERNEL, "if (!enough || over >= k)", "if (!enough)"),
    Mutant(TOPK + "test_hard_rows", "NaN ranks by its bits", TOPK_KERNEL, "return is_number(bits) ? (u32)word_of(__uint_as_float(bits)) ^ 0x80000000u : 0u;", "return (u32)word_of(__uint_as_float(bits)) ^ 0x80000000u;"),
    Mutant(TOPK + "test_hard_rows", "ties are ranked by the higher position", TOPK_KERNEL, "<< 32 | (u32)i : ~0ull;", "<< 32 | (u32)(k - 1 - i) : ~0ull;"),
    Mutant(TOPK + "test_hard_rows", "NaN of the reference ranks by its bits", "src/qaxis/ranking/reference.py", "torch.where(torch.isnan(scores), NO_NUMBER, sort_key(scores))", "sort_key(scores)"),
    Mutant(TOPK + "test_hard_rows", "ties of the reference go to the higher position", "src/qaxis/ranking/reference.py", "lowest_first = n - 1 - torch.arange(n, device=scores.device)", "lowest_first = torch.arange(n, device=scores.device)"),
    Mutant("topk", "ties of a list go to the higher position", TOPK_KERNEL, "lists.rank(lists.place[i]) >= taken", "lists.rank(lists.place[i]) < s.tied - taken"),
    Mutant("topk", "ties go to the higher position by rank", TOPK_KERNEL, "<< 32 | (u32)i : ~0ull;", "<< 32 | (u32)(k - 1 - i) : ~0ull;"),
    Mutant("topk", "ties of the reference go to the higher position", "src/qaxis/ranking/reference.py", "lowest_first = n - 1 - torch.arange(n, device=scores.device)", "lowest_first = torch.arange(n, device=scores.device)"),
    Mutant("topk", "NaN first", TOPK_KERNEL, "word_of(__uint_as_float(bits)) ^ 0x80000000u : 0u;", "word_of(__uint_as_float(bits)) ^ 0x80000000u : 0xffffffffu;"),
    Mutant("topk", "NaN of the reference first", "src/qaxis/ranking/reference.py", "NO_NUMBER = torch.iinfo(torch.int32).min", "NO_NUMBER = torch.iinfo(torch.int32).max"),
    Mutant("topk", "sign of zero lost", TOPK_KERNEL, "values[at] = bits, indices[at] = position;", "values[at] = bits == 0x80000000u ? 0u : bits, indices[at] = position;"),
    Mutant("topk", "sign of zero lost where values are gathered", "src/qaxis/ranking/api.py", "return TopK(scores.gather(-1, indices), indices)", "return TopK(scores.gather(-1, indices) + 0.0, indices)"),
    Mutant("topk", "zeros rank by their sign", TOPK_KERNEL, "? (u32)word_of(__uint_as_float(bits)) ^ 0x80000000u : 0u;", "? (bits >> 31 ? ~bits : bits | 0x80000000u) : 0u;"),
    Mutant("topk", "a bin off by one", TOPK_KERNEL, "threadIdx.x * EACH + i, inside = c[i];", "threadIdx.x * EACH + i + 1, inside = c[i];"),
    Mutant("topk", "NaN beside a row is one of its own", TOPK_KERNEL, "if (j < last && position(j) + e < (u32)n)", "if (j < last && (position(j) >> 31 || position(j) < (u32)n))"),
    Mutant("test_topk_claims.py::test_the_claim_sees_a_position_a_bit_and_a_call_that_fails", "bits of values are not compared", "selfcheck/checks/topk.py", " & (bits(values.view(-1, k)) == bits(chosen))", ""),
    Mutant("test_topk_claims.py::test_the_claim_sees_a_position_a_bit_and_a_call_that_fails", "a call that fails is no wrong row", "selfcheck/checks/topk.py", "self.add(name, len(expected), len(expected), f\", {type", "self.add(name, len(expected), 0, f\", {type"),
    Mutant("test_topk_claims.py::test_what_a_gpu_repeats_is_compared", "not the replay is compared, but the call before the capture", "selfcheck/checks/topk.py", "differing(kept[-1], scores, k, expected)", "differing(kept[0], scores, k, expected)"),
    Mutant("test_topk_claims.py::test_times_of_one_round_are_paired", "a ratio is to itself", "selfcheck/checks/topk_speed.py", "over = ratio(times, ours)", "over = ratio(times, times)"),
    Mutant(TOPK + "test_kernels_read_no_byte_beside_the_rows", "what lies beside a row is part of it", TOPK_KERNEL, "if (j < last && position(j) + e < (u32)n)", "if (j < last && (position(j) >> 31 || position(j) < (u32)n))"),
    Mutant(TOPK + "test_kernels_read_no_byte_beside_the_rows", "whole loads begin before the row", TOPK_KERNEL, "return j < last && at >= 0 && at <= n - 4;", "return j < last && at <= n - 4;"),
    Mutant(TOPK + "test_nan_is_refused_by_its_place", "a NaN of a long row is not seen", TOPK_KERNEL, "if (missing) s.missing = 1;", ""),
    Mutant(TOPK + "test_what_a_capture_cannot_do_is_refused_in_it", "a capture is not asked about", "src/qaxis/ranking/api.py", "require(not captured(scores.device), \"nan\", nan, allowed)", "pass"),
    Mutant(TOPK + "test_with_nan_last_nothing_waits_for_the_device", "NaN is looked for where nobody asked", "src/qaxis/ranking/api.py", "if refuse and bool(missing.any()):", "if bool(missing.any()) and refuse:"),
    Mutant(TOPK + "test_gradients_are_those_of_torch", "gradients stop at the values", "src/qaxis/ranking/api.py", "if values is None or scores.requires_grad or", "if values is None or"),
    Mutant(TOPK + "test_forward_gradients_too", "forward gradients stop at the values", "src/qaxis/ranking/api.py", " or forward_ad.unpack_dual(scores).tangent is not None", ""),
    Mutant(TOPK + "test_any_strides", "kernels take any stride for one", "src/qaxis/ranking/cuda.py", "(n > 1 and scores.stride(1) != 1) or ", ""),
    Mutant(TOPK + "test_more_rows_than_a_grid_is_high", "rows go along the short side of the grid", "src/qaxis/ranking/cuda.py", "(rows * plan.cluster, 1, 1), (plan.threads, 1, 1),", "(plan.cluster, rows, 1), (plan.threads, 1, 1),"),
    Mutant(TOPK + "test_every_plan_fits", "a row that begins off 16 bytes is cut off", "src/qaxis/ranking/cuda.py", "span = rounded_up(-(-((n + 6) // 4) // cluster), 8)", "span = rounded_up(-(-(n // 4) // cluster), 8)"),
    # Theorem 1
    Mutant("thm1", "coordinate loses its sign", THEOREM, "1 if axis >= 0 else -1", "1"),
    Mutant("thm1", "cosine instead of inner product", THEOREM, "axis * axis / dot(q, q)", "axis * axis / (dot(k, k) or 1)"),
    Mutant("thm1", "last component of the product dropped", THEOREM, "axis = dot(q, k)", "axis = dot(q[:-1], k[:-1])"),
    Mutant("thm1-extends", "a cap that is not monotone", THEOREM, "mpmath.tanh(x / cap)", "mpmath.sin(x / cap)"),
    Mutant("thm1-extends", "RoPE that is not a rotation", THEOREM, "a * sin + b * cos", "a * sin - b * cos"),
    Mutant("thm1-extends", "sink subtracted from the scores of late keys", THEOREM, "[w / total for w in weights]", "[w / total / (1 + i) for i, w in enumerate(weights)]"),
    Mutant("thm1-stops", "negative scale accepted", "src/qaxis/validation.py", "real and LEAST_SCALE <= scale <= MOST_SCALE", "real"),
    Mutant("thm1-stops", "zero query gets an axis", "src/qaxis/attention/api.py", "if bool(zero.any()):", "if False:"),
    Mutant("proofs", "zero query allowed", PROOF, "Corollary query_axis_top : forall dim q keys n k, nonzero dim q ->", "Corollary query_axis_top : forall dim q keys n k,"),
    Mutant("proofs", "a step assumed", PROOF, "Proof. intros. apply same_order_top. now apply query_axis_order. Qed.", "Admitted."),
    Mutant("proofs", "tie rule not strict", PROOF, "(s i = s j /\\ (i < j)%nat)", "(s i = s j /\\ (i <= j)%nat)"),
    Mutant("test_proofs.py::test_an_attack_on_the_proofs_is_refused", "what a definition stands for is not compared", "selfcheck/checks/proofs.py", 'if name in said.bodies and name not in UNPRINTED:', "if False:"),
    Mutant("test_proofs.py::test_an_attack_on_the_proofs_is_refused", "a statement's type is not compared", "selfcheck/checks/proofs.py", "if fields.get(what) != was.get(what):", 'if what != "type" and fields.get(what) != was.get(what):'),
    Mutant("test_proofs.py::test_an_attack_on_the_proofs_is_refused", "objects that are not pinned pass", "selfcheck/checks/coq.py", "    if set(types) != set(names):\n", "    if False:\n"),
    Mutant("test_proofs.py::test_answers_that_are_not_understood_are_refused", "what is not understood of assumptions is passed over", "selfcheck/checks/coq.py", "        if found is None:\n            raise RefusedError(f\"{name}: Print Assumptions says {entry", "        if found is None:\n            continue\n            raise RefusedError(f\"{name}: Print Assumptions says {entry"),
    Mutant("test_proofs.py::test_the_checker_alone_finds_what_is_unsafe", "coqchk's unsafe fixpoints pass", "selfcheck/checks/coq.py", "        if sections.get(title) != expected.get(title):", '        if "unsafe" not in title and sections.get(title) != expected.get(title):'),
    Mutant("test_proofs.py::test_the_axioms_that_coqchk_names_are_the_pinned_ones", "any axiom that coqchk names passes", "selfcheck/checks/proofs.py", "    if not alone and {short", "    if False and {short"),
    # Floating point
    Mutant("fp-order", "bound forgets the depth of the tree", "src/qaxis/arithmetic/rounding.py", "gamma(levels + 3)", "gamma(1)"),
    Mutant("fp-order", "products rounded to bfloat16", ARITHMETIC, "return tree_sum(q * k)", "return tree_sum((q * k).bfloat16().float())"),
    Mutant("fp-order", "unit query rounded to bfloat16", "src/qaxis/attention/api.py", "return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)", "return (wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)).bfloat16().float()"),
    Mutant("fp-order", "search without near ties", FLOATING, "step = (aim * size - gap)", "step = (1000 * aim * size - gap)"),
    Mutant("fp-real", "bfloat16 key not rounded", "selfcheck/rivals/selectors.py", 'score.bfloat16().float() if which == "bf16"', 'score if which == "bf16"'),
    # Arithmetic
    Mutant("golden", "fused multiply-add in the exponential", ARITHMETIC, "        p = p * f\n        p = p + c", "        p = (p.double() * f.double() + c).float()"),
    Mutant("golden", "library exponential", REFERENCE, "p = torch.where(live, canonical.exp2(", "p = torch.where(live, torch.exp2("),
    Mutant("golden", "one coefficient wrong in its last digits", ARITHMETIC, "math.log(2.0) ** j / math.factorial(j)", "math.log(2.0) ** j / math.factorial(j) * (1 + (j == 3) * 1e-6)"),
    Mutant("golden", "range reduction off by one bit", ARITHMETIC, "ROUND_MAGIC = 12582912.0", "ROUND_MAGIC = 6291456.0"),
    Mutant("golden", "range of the exponential cut", ARITHMETIC, "torch.clamp(t, -200.0, 200.0)", "torch.clamp(t, -100.0, 200.0)"),
    Mutant("golden", "sum by halves instead of neighbours", ARITHMETIC, "x = x[..., 0::2] + x[..., 1::2]", "x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]"),
    Mutant("golden", "-0.0 left as it is", ARITHMETIC, "return x[..., 0] + 0.0", "return x[..., 0]"),
    Mutant("golden", "kernel sums in another order", RULES, "tl.sum(tl.reshape(x, (ROWS, N >> (level + 1), 2)), 2)", "tl.sum(tl.reshape(x, (ROWS, 2, N >> (level + 1))), 1)"),
    Mutant("golden", "kernel multiplies by the reciprocal", KERNELS, "tl.div_rn(numerator, tl.broadcast_to(safe, (DIM,)))", "numerator * tl.broadcast_to(1.0 / safe, (DIM,))"),
    Mutant("golden", "bfloat16 subnormals lost", RULES, "return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)", "return x.to(tl.float32)"),
    Mutant("golden", "ranking key rounded to bfloat16", ARITHMETIC, "bits = (score + 0.0).view", "bits = (score.bfloat16().float() + 0.0).view"),
    Mutant("kernel-grid", "fast exponential in the kernel", KERNELS, "p = tl.where(live, exp2(t), 0.0)", "p = tl.where(live, tl.exp2(t), 0.0)"),
    Mutant("kernel-grid", "maximum not subtracted", KERNELS, "(logit - top) * factor", "logit * factor"),
    # Selection
    Mutant("golden", ">= became >", SELECTION, "selected = fast >= kth", "selected = fast > kth"),
    Mutant("golden", "band ignored", SELECTION, "band = 2 * product_error_bound(q, k)", "band = 0 * product_error_bound(q, k)"),
    Mutant("golden", "one contested key too many", SELECTION, "< missing[row[order]]]", "<= missing[row[order]]]"),
    Mutant("golden", "tie to the higher position (reference)", SELECTION, "order = torch.argsort(canonical.sort_key(score), descending=True, stable=True)", "order = torch.argsort(canonical.sort_key(score).flip(0), descending=True, stable=True).neg() + score.shape[0] - 1"),
    Mutant("kernel-grid", "tie to the higher position (kernel)", KERNELS, "| lowest_first", "| (n - 1 - lowest_first)"),
    Mutant("golden", "budget rounded down", "src/qaxis/budget.py", "-(-over * n // under)", "(over * n // under)"),
    Mutant("golden", "minimum budget ignored", "src/qaxis/budget.py", "max(minimum, -(-over", "max(1, -(-over"),
    Mutant("golden", "causal leak of one key", SELECTION, "<= position[:, None])[None, None]", "<= position[:, None] + 1)[None, None]"),
    Mutant("golden", "last key dropped", KERNELS, "inside = j < n_out", "inside = j < n_out - 1"),
    Mutant("golden", "last value dropped", KERNELS, "mask=j < width, other=-1", "mask=j < width - 1, other=-1"),
    Mutant("golden", "wrong key head (kernel)", KERNELS, "    g = h // group\n    k = load", "    g = h % 2\n    k = load"),
    Mutant("golden", "wrong value head (kernel)", KERNELS, "    g = h // group\n    v = load", "    g = h % 2\n    v = load"),
    Mutant("golden", "wrong head (reference)", REFERENCE, "k[b, h // group].float(), v[b, h // group].float()", "k[b, h % k.shape[1]].float(), v[b, h % k.shape[1]].float()"),
    Mutant("golden", "wrong softmax scale", "src/qaxis/validation.py", "return head_dim**-0.5", "return head_dim**-0.51"),
    Mutant("selection", "reference keeps one key too few", SELECTION, "parts.append(mask_to_indices(select_mask(q[:, :, rows], k, some, wanted)", "parts.append(mask_to_indices(select_mask(q[:, :, rows], k, some, (wanted - 1).clamp(min=1))"),
    # Completion
    Mutant("completion", "runs of 32 keys", TAIL, "RUN = 16", "RUN = 32"),
    Mutant(COMPLETION + "test_where_moments_leave_float32_what_cannot_be_put_back_is_not", "what leaves float32 is put back as nothing, its mass stays", LINE, "fine | (level * most).isfinite()", "fine | True"),
    Mutant(COMPLETED + "test_moments_that_leave_float32", "a slope is put back whose products are no numbers", COMPLETE, "    if (finite(most)) return {alpha, beta, rest.mass};", "    if (finite(alpha)) return {alpha, beta, rest.mass};"),
    Mutant("completion", "selected keys stay in the excess", TAIL, "torch.cat([to_parts(excess), -to_parts(less)], -1)", "to_parts(excess)"),
    Mutant("completion", "sums count parts of 2^-30", TAIL, "PARTS, MOST = 2.0**40", "PARTS, MOST = 2.0**30"),
    Mutant("completion", "groups count from the first key that is there", TAIL, "(self.begin + self.offset + GROUP - 1) // GROUP, (self.end + self.offset) // GROUP", "(self.begin + GROUP - 1) // GROUP, self.end // GROUP"),
    Mutant("completion", "a group that padding begins in counts", TAIL, "(self.begin + self.offset + GROUP - 1) // GROUP", "(self.begin + self.offset) // GROUP"),
    Mutant("golden", "selected keys stay in the spread", TAIL, "fitted.total - selected.total, fitted.second - selected.second", "fitted.total - selected.total, fitted.second"),
    Mutant("completion", "any spread makes a slope", TAIL, "LEAST_SPREAD = 2.0**-12", "LEAST_SPREAD = -(2.0**-12)"),
    Mutant("completion-bound", "half the slope", TAIL, "beta = torch.where(sloped, excess /", "beta = torch.where(sloped, 0.5 * excess /"),
    Mutant("completion-bound", "a bound that is too small", TAIL_BOUND, "    crooked = (rows.fitted * (p - ruled)).norm(dim=-1)\n    apart", "    crooked = 0.3 * (rows.fitted * (p - ruled)).norm(dim=-1)\n    apart"),
    Mutant("completion-ppl", "completion is forgotten by enable", ENABLE, "Settings(chosen, exactness, backend, always, strict, kind)", 'Settings(chosen, exactness, backend, always, strict, "none")'),
    Mutant("test_completion_claims.py::test_the_claim_sees_a_bit_where_it_is_on_and_where_it_is_off", "bits are not looked at", "selfcheck/checks/completing.py", "            if said:\n                self.differ += rows", "            if False:\n                self.differ += rows"),
    Mutant("test_completion_claims.py::test_steps_on_a_gpu_have_every_kind_dtype_and_way_to_cut_the_work", "half the shapes of the step on a GPU", "selfcheck/checks/completing.py", "STEPPED[i % len(STEPPED)]", "STEPPED[i % 2]"),
    Mutant("test_completion_claims.py::test_a_step_is_timed_beside_the_same_without_a_completion_round_by_round", "a completed step is timed beside itself", COMPLETION_SPEED, 'ratio(own, times[f"{way}/none"])', "ratio(own, own)"),
    Mutant("test_completion_claims.py::test_a_timed_step_has_the_bits_of_its_reference", "what replays of completed steps wrote is not looked at", COMPLETION_SPEED, " and torch.equal(got.output, self._right(one)))", ")"),
    # Model and cache
    Mutant("kernel-real", "strides of queries mixed up", KERNELS, "i * stride_qm + d * stride_qd", "i * stride_qd + d * stride_qm"),
    Mutant("flag-off", "disable leaves qaxis on", ENABLE, "        restore(inner, switched)", "        pass"),
    Mutant("int8-twin", "scale not a power of two", QUANTIZATION, "return power_of_two(scales.to(torch.int32))", "return 1.1 * power_of_two(scales.to(torch.int32))"),
    Mutant("int8-bytes", "scales stored eight bytes wide", "src/qaxis/storage/side.py", "codes.flatten(2, 3), scales.squeeze(3)", "codes.flatten(2, 3), scales.squeeze(3).double()"),
    Mutant("int8-ppl", "update returns what it was given", LAYERS_QUANTISED, "        return self._tell(keys, values)\n", "        return self._tell(key_states, value_states)\n"),
    Mutant("int8-ppl", "scale doubled", QUANTIZATION, "return power_of_two(scales.to(torch.int32))", "return 2 * power_of_two(scales.to(torch.int32))"),
    Mutant(CACHE + "test_what_is_dequantised_is_exact_in_bfloat16_and_near", "scale one bit too fine for bfloat16", QUANTIZATION, "SIGNIFICAND + 1 - grid.bits", "SIGNIFICAND + 2 - grid.bits"),
    Mutant(CACHE + "test_what_is_dequantised_is_exact_in_bfloat16_and_near", "planes of bits out of place", QUANTIZATION, "shift += width", "shift += 1"),
    Mutant(CACHE + "test_what_is_dequantised_is_exact_in_bfloat16_and_near", "codes truncated", QUANTIZATION, "codes = _clamped(torch.round(x / scale)", "codes = _clamped(torch.trunc(x / scale)"),
    Mutant(CACHE + "test_however_it_is_fed_it_stores_the_same", "first tokens survive a crop", "src/qaxis/storage/side.py", '        self.parts["first"].crop(length)\n', ""),
    Mutant(CACHE + "test_first_tokens_stay_in_full_and_spoil_no_scale", "first tokens widen scales", "src/qaxis/storage/side.py", 'if self.grid.per == "channel" and self.sinks', 'if self.grid.per == "none" and self.sinks'),
    Mutant(CACHE + "test_streaming_protocol_is_what_token_by_token_gives", "streaming quantises the open group", "selfcheck/rivals/streaming.py", "torch.cat([quantised[:, :, :start], x[:, :, start:stop]], dim=2)", "quantised[:, :, :stop]"),
    Mutant(CACHE + "test_bad_states_are_refused_and_the_cache_is_unchanged", "NaN reaches the cache", QUANTISED, "if not bool(torch.isfinite(k)", "if False and not bool(torch.isfinite(k)"),
    Mutant(DIRECT, "an open group is read from the codes", KERNELS_QUANTIZED, "mask & (position >= whole) & (position >= sinks)", "mask & (position > whole) & (position >= sinks)"),
    Mutant(DIRECT, "first tokens are read as zeros", KERNELS_QUANTIZED, "in_first = mask & (position < sinks)", "in_first = mask & (position < 0)"),
    Mutant(DIRECT, "scale of the group before", KERNELS_QUANTIZED, "(position // SHARING) * scales_n", "tl.maximum(position // SHARING - 1, 0) * scales_n"),
    Mutant(CACHE + "test_the_model_reads_the_codes_without_a_dequantised_copy", "a dequantised copy is made after all", KERNELS_QUANTIZED, "(s.grid.bits == 8 and", "(s.grid.bits == 9 and"),
    Mutant(SITUATIONS + "test_flex_attention", "a compiler is handed lazy tensors", CACHES, '_READ_LAZILY = (NAME,', '_READ_LAZILY = (NAME, "flex_attention",'),
    Mutant(SITUATIONS + "test_copies_made_in_inference_mode_go_on_outside", "a copy is made of inference mode's tensors", CACHES, "            vars(other).update(copy.deepcopy(vars(self), memo))", "            pass\n        vars(other).update(copy.deepcopy(vars(self), memo))"),
    Mutant(SITUATIONS + "test_copies_made_in_inference_mode_go_on_outside", "what is unpickled has inference mode's tensors", CACHES, "if torch.is_inference_mode_enabled():", "if False:"),
    Mutant(SITUATIONS + "test_the_attention_at_the_time_decides_what_it_is_handed", "a copied cache forgets its configuration", CACHES, "def __deepcopy__(self, memo: Any) -> _Readers:", "def _copied(self, memo: Any) -> _Readers:"),
    Mutant(SITUATIONS + "test_the_cross_cache_is_filled_once", "a layer shows no keys", LAYERS_QUANTISED, "return dequantized(self.sides[0].stored()) if self.sides else None", "return None"),
    Mutant(SITUATIONS + "test_logits_of_every_kind_of_cache", "hybrid layers stay in full", LAYERS_QUANTISED, "    LinearAttentionAndFullAttentionLayer: QuantizedHybridLayer,\n", ""),
    Mutant(SITUATIONS + "test_generate", "beams leave recurrent states behind", LAYERS_QUANTISED, "        LinearAttentionLayer.reorder_cache(self, beam_idx)\n", ""),
    Mutant(SITUATIONS + "test_update_names_what_does_not_fit_and_changes_nothing", "values of another dtype are stored", QUANTISED, "check_states(self, k, v, names)", "pass"),
    Mutant(SITUATIONS + "test_early_initialisation_and_a_new_start_take_any_shape", "an empty cache insists on its first shape", HOLDING, "if self.kv is not None and self.kv.length:", "if self.kv is not None:"),
    Mutant(SITUATIONS + "test_values_may_have_no_width", "values have to have a width", HOLDING, "key_states if bare else value_states, 4", "value_states, 4"),
    Mutant(SITUATIONS + "test_bytes_are_those_of_every_layer", "recurrent states are not counted", CACHES, "    elif isinstance(x, (dict, list, tuple)):", "    elif isinstance(x, (list, tuple)):"),
    Mutant(SITUATIONS + "test_what_a_file_cannot_hold_is_named", "a window of another length is read", CACHE_FILE, "require(x.shape[2] == held,", "require(True,"),
    Mutant(SITUATIONS + "test_saved_and_loaded_a_second_turn_goes_on", "a window forgets how far it has come", CACHE_FILE, "layer.keys, layer.values, layer.cumulative_length = keys, values, seen", "layer.keys, layer.values, layer.cumulative_length = keys, values, keys.shape[2]"),
    Mutant(CACHE + "test_save_and_load", "a file of another model is read", "src/qaxis/models/cache_file.py", 'len(about["dtypes"]) == len(cache.layers), "layers"', 'True, "layers"'),
    Mutant("entropy", "entropy in the wrong sign", "src/qaxis/measures/entropy.py", "return -torch.where(", "return torch.where("),
    Mutant("dppl", "sparse run is dense", "selfcheck/inputs/passes.py", "qaxis.sparse(model, qaxis.Budget()", "qaxis.sparse(model, qaxis.Budget(1.0)"),
    # Contract of the library
    Mutant(LIBRARY + "test_bad_input_is_named", "NaN and Inf let through", "src/qaxis/validation.py", "if not bool(finite.all()):", "if False:"),
    Mutant(LIBRARY + "test_overflowing_products_are_refused_by_both_backends", "overflowed scores ranked", ARITHMETIC, "    if not bool(finite.all()):", "    if False:"),
    # enable on every build: which modules, whose configuration, which masks
    Mutant(BUILDS + "test_encoder_decoders_see_what_they_saw", "no mask read as causal in modules that are not", MASKS, "whole = causal and q_length == kv_length and", "whole = q_length == kv_length and"),
    Mutant(BUILDS + "test_encoder_decoders_see_what_they_saw", "cross attention gets a mask that eager attention adds", MASKS, "    if \"allow_is_bidirectional_skip\" in kwargs and before", "    if False and before"),
    Mutant(BUILDS + "test_only_the_decoder_of_an_encoder_decoder_is_switched", "cross attention is chosen", LAYERS, '_ELSEWHERE = ("cross", "encoder_attn",', '_ELSEWHERE = ("cross",'),
    Mutant(BUILDS + "test_only_the_decoder_of_an_encoder_decoder_is_switched", "every module around reads the twin", SWITCHING, "    return [module for path, module in modules.items() if path in wanted]", "    return list(modules.values())"),
    Mutant(BUILDS + "test_two_models_of_one_configuration", "the configuration itself is written", SWITCHING, "        copied = copy.copy(config)", "        copied = config"),
    Mutant(BUILDS + "test_every_configuration_is_the_object_from_before", "the twin stays", SWITCHING, "                module.__dict__[attribute] = self.original", "                pass"),
    Mutant(BUILDS + "test_what_the_user_changes_meanwhile_is_kept", "changes on the twin are lost", SWITCHING, "        twin.hand_back(originals)", "        pass"),
    Mutant(BUILDS + "test_what_the_user_changes_meanwhile_is_kept", "enabled again, but by the name of another", SWITCHING, "        known.name_again()", "        pass"),
    Mutant(BUILDS + "test_a_copy_of_an_enabled_model_is_enabled_and_apart", "a copy forgets what its twin stands for", SWITCHING, "        self.__dict__.update(state)\n        self._register()", "        self.__dict__.update(state)"),
    Mutant(BUILDS + "test_enabling_a_part_and_disabling_the_whole", "a hook stays", ENABLE, "        hook.remove()", "        pass"),
    Mutant(BUILDS + "test_a_part_is_undone_for_the_whole", "readers around a part keep the twin", SWITCHING, "        queue += [other for other in twin.around", "        queue += [other for other in ()"),
    Mutant(BUILDS + "test_a_part_is_undone_for_the_whole", "what was switched before sparse() is not put back", SWITCHING, "                twin.name_again()\n                twin.read_by(module, attribute)", "                pass"),
    Mutant(BUILDS + "test_a_part_is_undone_for_the_whole", "readers that sparse() added stay", SWITCHING, " or (id(module), attribute) not in reading:", ":"),
    Mutant(BUILDS + "test_a_cache_made_while_enabled_serves_other_attention", "who holds a twin reads our name for ever", SWITCHING, "        now[_IMPLEMENTATION] = before[_IMPLEMENTATION]", "        pass"),
    Mutant(BUILDS + "test_a_model_being_recorded_can_be_copied", "a copy counts for the original", RECORDING, "        if module is not self.decoder:", "        if False:"),
    Mutant(BUILDS + "test_budgets_name_the_layers_that_attend", "a budget for a layer without attention", SETTINGS, "(is_integer(name) and name in layers)", "is_integer(name)"),
    Mutant(BUILDS + "test_models_that_qaxis_cannot_serve_are_refused_with_the_reason", "a model's own selection swallowed", LAYERS, '    found = [f"passes {\', \'.join(unknown)}"] if unknown else []', "    found = []"),
    Mutant(BUILDS + "test_models_that_qaxis_cannot_serve_are_refused_with_the_reason", "a mask of the module's own not seen", LAYERS, "    if any(method.computes_mask() for method in methods):", "    if False:"),
    Mutant(BUILDS + "test_arguments_that_qaxis_does_not_know_are_refused", "unknown arguments swallowed", MODELS, "            value is None or name in HARMLESS, name", "            True, name"),
    Mutant(BUILDS + "test_masks_of_every_form", "a small bias taken for a mask", MASKS, "    clear = bool((shown | hidden).all())", "    clear = True"),
    Mutant(BUILDS + "test_masks_of_every_form", "padding of a two-dimensional mask ignored", MASKS, "        return (mask[:, None, None, -n:] != 0) & _everything", "        return _everything"),
    Mutant(BUILDS + "test_the_module_decides_what_no_mask_means", "no mask for some of the keys taken as causal", MASKS, "        require(not causal or m == n,", "        require(True,"),
    Mutant(BUILDS + "test_inside_autocast_nothing_but_the_dtype_changes", "products inside autocast", MODELS, "    with torch.autocast(query.device.type, enabled=False):", "    with torch.autocast(query.device.type, enabled=True):"),
    Mutant(MODEL + "test_models_that_add_a_bias_to_scores_are_refused", "ALiBi accepted", LAYERS, "            bias is None,", "            True,"),
    Mutant(MODEL + "test_left_padding_is_never_selected", "padding selected", MASKS, "    return mask if mask.dtype == torch.bool else", "    return mask | _everything(m, n, causal, query.device) if mask.dtype == torch.bool else"),
    Mutant(MODEL + "test_off_leaves_no_trace", "settings left on the modules", ENABLE, "    set_settings(module, settings)\n", "    set_settings(module, settings or settings_of(module))\n"),
    Mutant(MODEL + "test_refusals", "gradients let through", "src/qaxis/validation.py", "if torch.is_grad_enabled() and", "if False and"),
    Mutant(MODEL + "test_selection_mode_stays_within_its_stated_bound", "fast mode keeps one key more", MASKED, "k, mask, k_eff, scores)", "k, mask, (k_eff + 1).clamp(max=n), scores)"),
    # In transformers
    Mutant("flag-off", "importing changes a global default", "src/qaxis/__init__.py", '__version__ = "0.1.0"', '__version__ = "0.1.0"\n__import__("torch").set_default_dtype(__import__("torch").float64)'),
    Mutant("families", "soft cap ignored", REFERENCE, "else canonical.soft_cap(logit, logits.soft_cap)", "else logit"),
    Mutant("families", "sink left out of the denominator", REFERENCE, "denominator = denominator + canonical.exp2(", "denominator = denominator + 0 * canonical.exp2("),
    Mutant("families", "the worst keys in fast mode", MASKED, "mask = select_mask(q[:, :, rows], k,", "mask = select_mask(-q[:, :, rows], k,"),
    Mutant("architectures", "the future is visible where there is no mask", MASKS, "    return causal_mask(m, n, device) if causal else", "    return causal_mask(m, n, device) if False else"),
    Mutant(WINDOW, "sliding window ignored", MASKS, 'kwargs["allow_is_bidirectional_skip"] = False', 'kwargs["mask_function"] = sdpa_mask.__globals__["causal_mask_function"]'),
    Mutant(GENERATION + "test_static_cache_beams_and_assisted_decoding_agree_with_the_plain_way", "no mask means causal from the first key", MASKS, "(q_length == 1 or whole)", "True"),
    Mutant(GENERATION + "test_layers_with_their_own_budgets", "one dense layer too many", SETTINGS, "if 0 <= layer < first_dense:", "if 0 <= layer <= first_dense:"),
    Mutant(GENERATION + "test_sinks_and_recent_keys_are_kept_inside_the_budget", "kept keys come on top of the budget", ALWAYS, "k_eff[:, :, rows] - kept.sum(-1)", "k_eff[:, :, rows]"),
    Mutant(GENERATION + "test_sinks_and_recent_keys_are_kept_inside_the_budget", "recent window off by one", ALWAYS, "place[..., -1:] - always.recent)", "place[..., -1:] - always.recent + 1)"),
    Mutant(GENERATION + "test_layers_with_their_own_budgets", "mass of the dropped keys", RECORDING, "torch.where(kept, weights, 0.0)", "torch.where(kept, 0.0, weights)"),
    Mutant(GENERATION + "test_recording_changes_no_bit_and_counts", "recording changes the cached keys", RECORDING, "q, k = call.query.float(), call.key.float()", "q, k = call.query.float(), call.key.mul_(-0.5).float()"),
    Mutant(GENERATION + "test_falling_back_is_counted_and_strict_mode_raises", "fallbacks not counted", RECORDING, "self.recording.fallbacks += id(module) in self.known", "self.recording.fallbacks += 0"),
    Mutant(GENERATION + "test_falling_back_is_counted_and_strict_mode_raises", "strict mode silent", ENABLE, "    raise RuntimeError(", "    RuntimeError("),
    Mutant(GENERATION + "test_a_compiled_decode_step_gives_the_same_bits_and_leaves_attention_alone", "attention handed to the compiler", MODELS, "@torch.compiler.disable(", "@(lambda reason: lambda f: f)("),
    # Harness
    Mutant(HARNESS + "test_one_changed_byte_is_named_and_nothing_runs", "stale lock entry passes", ISOLATED, "    if actual == digest:", "    if True:"),
    Mutant(MACHINES + "test_a_clone_that_converts_line_endings_keeps_every_byte", "git may convert line endings", ".gitattributes", "* -text", "# -text"),
    Mutant(MACHINES + "test_a_changed_byte_among_converted_lines_is_a_change", "any change passes for line endings", ISOLATED, "    if digest in (hashlib", "    if True or digest in (hashlib"),
    Mutant(MACHINES + "test_converted_line_endings_are_named_as_such_and_mended_as_said", "line endings are a change as any", ISOLATED, "    if digest in (hashlib", "    if False and digest in (hashlib"),
    Mutant(MACHINES + "test_a_target_that_cannot_be_written_is_named_before_anything_is_measured", "measured first, written never", "selfcheck/__main__.py", "    surroundings.check_writable(*targets(options))\n", ""),
    Mutant(MACHINES + "test_a_tree_of_another_user_is_noticed", "writing is not tried", PRECAUTIONS, 'with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".staging"):', "if True:"),
    Mutant(MACHINES + "test_output_elsewhere_leaves_the_tree_and_is_found_by_what_reads_evidence", "written into the tree all the same", KEEPING, "path, merged = target(name, root, folder),", "path, merged = target(name, root),"),
    Mutant(MACHINES + "test_output_elsewhere_leaves_the_tree_and_is_found_by_what_reads_evidence", "notes are left in the tree", "selfcheck/harness/jobs.py", '{"HYPOTHESIS_STORAGE_DIRECTORY":', '{"HYPOTHESIS":'),
    Mutant(MACHINES + "test_without_a_home_caches_go_to_one_that_is_removed", "any home serves", PRECAUTIONS, "if home is not None and home.is_dir() and os.access(home, os.W_OK | os.X_OK):", "if home is not None:"),
    Mutant(MACHINES + "test_a_gguf_file_is_parsed_once_inside_and_as_before_outside", "a library stays patched", "selfcheck/inputs/subjects.py", "        library.GGUFReader, library.get_tensor_name_map = before\n", "        pass\n"),
    Mutant(HARNESS + "test_missing_extra_and_unreadable_sealed_files_are_named", "extra files pass", "selfcheck/harness/seal.py", "if n not in files]", "if False]"),
    Mutant(HARNESS + "test_a_changed_token_makes_evidence_stale_and_a_comment_does_not", "stale evidence passes", EVIDENCE, "    if changed:", "    if False:"),
    Mutant(HARNESS + "test_the_paper_fails_closed", "failed claim reaches the paper", EVIDENCE, 'failed = [] if record["passed"] else', "failed = [] if True else"),
    Mutant(HARNESS + "test_the_paper_fails_closed", "quick evidence reaches the paper", EVIDENCE, 'if record["profile"] != "full":', "if False:"),
    Mutant(HARNESS + "test_evidence_round_trip_and_an_edited_record", "records not chained", RECORDS, "(link + record_digest(record))", "record_digest(record)"),
    Mutant(HARNESS + "test_evidence_round_trip_and_an_edited_record", "chain not checked", RECORDS, 'if chain(records) != (document["links"], document["root"]):', "if False:"),
    Mutant(HARNESS + "test_gpu_evidence_is_needed_and_read_from_its_own_file", "GPU claims not needed", EVIDENCE, 'state.word, state.reasons = "missing", ["missing"]', 'state.word, state.reasons = "missing", []'),
    Mutant(HARNESS + "test_a_claim_that_cannot_run_is_never_passed", "a claim that cannot run passes", "selfcheck/__main__.py", "if name in only or not records]", "if False]"),
    # Files of evidence: what is refused, believed, the same elsewhere, and never lost
    Mutant(OF_EVIDENCE + "test_a_claim_asked_for_by_name_that_cannot_run_is_an_exit_status", "one of two claims asked for may be left out", "selfcheck/__main__.py", "if name in only or not records]", "if not records]"),
    Mutant(OF_EVIDENCE + "test_a_file_that_is_no_evidence_is_refused_in_a_sentence", "a key may be there twice", STRICT, "if len(made) < len(pairs):", "if False:"),
    Mutant(OF_EVIDENCE + "test_a_file_that_is_no_evidence_is_refused_in_a_sentence", "NaN is read", STRICT, "parse_constant=_refuse, ", ""),
    Mutant(OF_EVIDENCE + "test_a_file_that_is_no_evidence_is_refused_in_a_sentence", "1e999 is read as infinity", STRICT, "if not math.isfinite(number):", "if False:"),
    Mutant(OF_EVIDENCE + "test_a_file_that_is_no_evidence_is_refused_in_a_sentence", "deep nesting ends in a traceback", STRICT, "except RecursionError:", "except ZeroDivisionError:"),
    Mutant(OF_EVIDENCE + "test_a_file_that_is_no_evidence_is_refused_in_a_sentence", "any depth is read", STRICT, "if _depth(made) > DEEPEST:", "if False:"),
    Mutant(OF_EVIDENCE + "test_what_is_no_regular_file_is_refused_and_not_waited_for", "a pipe is waited for", STRICT, "if path.exists() and not path.is_file():", "if path.is_dir():"),
    Mutant(OF_EVIDENCE + "test_a_record_that_is_not_of_the_schema_is_refused_by_key", "records may have keys of their own", "selfcheck/evidence.schema.json", '"additionalProperties": false,\n   "properties": {\n    "cases"', '"properties": {\n    "cases"'),
    Mutant(OF_EVIDENCE + "test_a_record_that_is_not_of_the_schema_is_refused_by_key", "passed may be a word", "selfcheck/evidence.schema.json", '"passed": {"type": "boolean"}', '"passed": {"type": ["boolean", "string"]}'),
    Mutant(OF_EVIDENCE + "test_a_record_that_is_not_of_the_schema_is_refused_by_key", "names of data may be TeX", "selfcheck/evidence.schema.json", "[A-Za-z0-9 _.,:=%+()<>*/&|-]{1,100}", "[ -~]{1,100}"),
    Mutant(OF_EVIDENCE + "test_a_claim_that_is_there_twice_is_refused_but_not_on_two_cards", "claims may be there twice", RECORDS, "        if key in seen:", "        if False:"),
    Mutant(OF_EVIDENCE + "test_no_mutated_record_makes_a_traceback", "the schema is not asked", RECORDS, "        if said := malformed(record):", "        if False:"),
    Mutant(OF_EVIDENCE + "test_no_mutated_bytes_make_a_traceback", "invalid UTF-8 ends in a traceback", STRICT, "except UnicodeDecodeError as error:", "except ZeroDivisionError as error:"),
    Mutant(OF_EVIDENCE + "test_what_no_run_would_have_written_is_not_believed", "a GPU claim of any device is believed", EVIDENCE, 'if not re.fullmatch(GPUS if on_gpu else CPUS, record["device"]):', "if False:"),
    Mutant(OF_EVIDENCE + "test_what_no_run_would_have_written_is_not_believed", "evidence of 2099 is believed", EVIDENCE, 'return "in the future" if time > latest else ""', 'return ""'),
    Mutant(OF_EVIDENCE + "test_what_no_run_would_have_written_is_not_believed", "any seed is believed", EVIDENCE, 'if record["seed"] != SEED:', "if False:"),
    Mutant(OF_EVIDENCE + "test_what_no_run_would_have_written_is_not_believed", "another statement is believed", EVIDENCE, 'if record["statement"] != state.claim["statement"] or', "if False and"),
    Mutant(OF_EVIDENCE + "test_a_gpu_claim_is_not_read_from_the_file_of_cpu_claims", "a claim in the other file is passed over", EVIDENCE, 'if of_file[record["claim"]] != name:', "if False:"),
    Mutant(OF_EVIDENCE + "test_a_result_that_could_not_be_read_again_is_a_failed_claim", "results are kept that cannot be read", "selfcheck/harness/run.py", "    if wrong := _unfit(made):", "    if wrong := None:"),
    Mutant(OF_EVIDENCE + "test_two_laboratories_have_one_content_root_in_any_order", "the content root depends on when", CONTENT, '"seed", "checks", "cases",', '"seed", "checks", "cases", "time",'),
    Mutant(OF_EVIDENCE + "test_two_laboratories_have_one_content_root_in_any_order", "the content root has times of a GPU", CONTENT, '"timed": ("unit",)', '"timed": ("unit", "value")'),
    Mutant(OF_EVIDENCE + "test_whatever_is_content_changes_the_content_root", "data are no content", CONTENT, '        kept["data"] = record["data"]\n', "        pass\n"),
    Mutant(OF_EVIDENCE + "test_whatever_is_content_changes_the_content_root", "whether it passed is no content", CONTENT, '"profile", "passed",', '"profile",'),
    Mutant(OF_EVIDENCE + "test_a_second_party_is_compared_claim_by_claim", "a value outside the committed interval agrees", COMPARING, "if not low <= found <= high:", "if False:"),
    Mutant(OF_EVIDENCE + "test_a_second_party_is_compared_claim_by_claim", "any bits are identical", COMPARING, "wrong = state.reasons + differences(content(theirs, root), content(ours, root))", "wrong = list(state.reasons)"),
    Mutant(OF_EVIDENCE + "test_a_second_party_is_compared_claim_by_claim", "a second party is believed anything", COMPARING, "wrong = state.reasons + differences", "wrong = differences"),
    Mutant(OF_EVIDENCE + "test_an_attested_run_writes_beside_and_is_compared", "a second party writes over ours", "selfcheck/harness/run.py", "    if options.attest:\n        return attested(options.attest)\n", ""),
    Mutant(OF_EVIDENCE + "test_nothing_is_merged_into_what_cannot_be_read", "what cannot be read is written over", KEEPING, '        raise SelfcheckError(f"{error}. Nothing was written into it") from error', "        return []"),
    Mutant(OF_EVIDENCE + "test_nothing_is_merged_into_what_cannot_be_read", "the target is looked at after the measurements", "selfcheck/__main__.py", "    check_kept(options)\n", ""),
    Mutant(OF_EVIDENCE + "test_two_processes_at_once_keep_the_records_of_both", "two runs revert one another's records", KEEPING, "        lock.acquire()\n", "        pass\n"),
    Mutant(OF_EVIDENCE + "test_stopped_after_the_first_of_two_claims_the_first_is_kept", "records are written at the end", "selfcheck/__main__.py", "        pool.done = lambda record: KEPT.keep(record, options)\n", ""),
    Mutant(HARNESS + "test_unwritable_and_full_targets_lose_nothing", "evidence written in place", "selfcheck/harness/files.py", "            stream.write(data)\n", "            path.write_bytes(data)\n"),
    Mutant(HARNESS + "test_an_interruption_that_python_drops_is_heard", "an interruption may be dropped", "selfcheck/__main__.py", "_thread.start_new_thread(interrupt_again, ())", "pass"),
    Mutant(HARNESS + "test_no_measured_number_is_typed_into_the_paper", "a number typed by hand", "paper/paper.tex", "\\section{Limitations}", "\\section{Limitations}\nThe ratio was 0.5059."),
    # The archive
    Mutant("test_archive.py::test_every_changed_byte_is_named", "a changed byte passes the list of digests", "archive/listing.py", 'elif (found := sha256(path)) != digest:', 'elif (found := sha256(path)) != digest and False:'),
    Mutant("test_archive.py::test_every_missing_or_added_file_is_named", "files that no list names pass", "archive/listing.py", 'if name not in known)', 'if name not in known and False)'),
    Mutant("test_archive.py::test_what_is_no_list_is_said_to_be_none", "a list may name what lies outside", "archive/listing.py", ' or refusal(match[2])', ''),
    Mutant("test_archive.py::test_a_changed_tree_is_not_packed", "files need not be those of the commit", "archive/tree.py", 'if tree.swhid != f"swh:1:dir:{named[1].decode()}":', 'if not tree.swhid:'),
    Mutant("test_archive.py::test_another_commit_is_not_the_one_of_the_statement", "a statement may name another commit than its object", "archive/statement.py", 'if subjects.get("commit") != {"gitCommit": revision(commit_object(source))}:', 'if "commit" not in subjects:'),
    Mutant("test_archive.py::test_a_file_changed_under_a_good_signature_is_named", "a statement is not compared with the files", "archive/statement.py", 'return path.is_file() and sha256(path) == digest', 'return path.is_file()'),
    Mutant("test_archive.py::test_a_signature_over_what_was_changed_since_is_an_error", "a bad signature passes", "archive/signing.py", '    if done.returncode:\n        raise SelfcheckError(f"{SIGNATURE}: not a good', '    if done.returncode < 0:\n        raise SelfcheckError(f"{SIGNATURE}: not a good'),
    Mutant("test_archive.py::test_a_signature_of_another_key_or_purpose_counts_for_nothing", "a signature for another purpose counts", "archive/signing.py", '"-Y", "verify", "-f", str(allowed), "-I", who, "-n", NAMESPACE,', '"-Y", "check-novalidate", "-n", "other",'),
    Mutant("test_archive.py::test_an_old_signature_is_not_packed", "a signature of another state is packed", "archive/pack.py", 'if not stated.is_file() or stated.read_bytes() != made[tree.STATEMENT]:', 'if not stated.is_file():'),
    Mutant("test_archive.py::test_a_hostile_member_is_refused_before_anything_is_written", "links and devices are unpacked", "archive/unpack.py", 'if member.type != tarfile.REGTYPE or member.issparse():', 'if member.issparse():'),
    Mutant("test_archive.py::test_a_hostile_member_is_refused_before_anything_is_written", "names lead out of the folder", "archive/listing.py", ' or not inside(name):', ':'),
    Mutant("test_archive.py::test_a_hostile_member_is_refused_before_anything_is_written", "an archive brings settings of git", "archive/listing.py", 'if ".git" in parts:', 'if ".git" in name:'),
    Mutant("test_archive.py::test_a_bomb_is_stopped", "any number of bytes is unpacked", "archive/unpack.py", 'if size > UNPACKED:', 'if size < 0:'),
    Mutant("test_archive.py::test_an_archive_is_sorted_of_nobody_and_of_one_time", "members in any order", "archive/tarball.py", 'for name in sorted(files):', 'for name in files:'),
    Mutant("test_archive.py::test_two_packs_are_one_and_so_is_that_of_the_unpacked_archive", "the crate is dated by the clock", "archive/crate.py", '    crate.datePublished = newest\n', ''),
    Mutant("test_archive.py::test_no_code_of_a_changed_archive_is_run", "code of a changed archive is run", "archive/check.py", 'if not all(step.ok for step in steps):', 'if not steps:'),
    Mutant("test_archive.py::test_what_an_archive_cannot_make_again_is_wrong", "what is redrawn is not compared", "archive/check.py", 'return (root / name).is_file() and sha256(root / name) == sha256(drawn / name)', 'return (root / name).is_file()'),
    Mutant("test_archive.py::test_what_is_no_doi_of_this_package_is_refused", "anything that begins as a DOI is one", "archive/metadata.py", 'if not DOI.fullmatch(minted):', 'if not DOI.match(minted):'),
    Mutant("test_archive.py::test_committed_metadata_is_what_its_source_and_the_evidence_give", "metadata written by hand pass", "archive/citation.py", '"abstract": said["description"],', '"abstract": said["title"],'),
    Mutant("test_archive.py::test_byte_code_beside_the_archives_programs_is_not_run", "byte code of an archive is obeyed", "archive/check.py", '[sys.executable, *ISOLATED, *words]', '[sys.executable, "-m", *words]'),
    Mutant("test_archive.py::test_a_hostile_member_is_refused_before_anything_is_written", "byte code is unpacked", "archive/listing.py", 'if BYTE_CODE.fullmatch(same(name)):', 'if BYTE_CODE.fullmatch(""):'),
    Mutant("test_archive.py::test_a_hostile_member_is_refused_before_anything_is_written", "names of devices are unpacked", "archive/listing.py", 'if any(DEVICE.fullmatch(part) for part in parts):', 'if not parts:'),
    Mutant("test_archive.py::test_a_name_that_is_not_unpacked_is_not_packed", "what cannot be unpacked is packed", "archive/tree.py", 'if (why := listing.refusal(name))]', 'if (why := listing.refusal("a"))]'),
    Mutant("test_archive.py::test_a_tracked_file_that_is_not_there_is_named", "absent files are left out", "archive/tree.py", '    if absent:\n', '    if not names:\n'),
    Mutant("test_archive.py::test_a_commit_in_another_encoding_keeps_its_name", "bytes of a commit are lost", "archive/statement.py", 'return {"commit": commit.decode(BYTES), "encoding": BYTES}', 'return {"commit": commit.decode(errors="replace")}'),
    Mutant("test_archive.py::test_a_statement_of_something_else_is_wrong_before_any_code_runs", "a statement may say anything of the evidence", "archive/statement.py", 'if predicate.get(name) != found:', 'if not found:'),
    Mutant("test_archive.py::test_a_statement_of_something_else_is_wrong_before_any_code_runs", "a subject may be named twice", "archive/statement.py", 'for name, n in named.items() if n > 1]', 'for name, n in named.items() if n > 2]'),
    Mutant("test_archive.py::test_a_statement_of_something_else_is_wrong_before_any_code_runs", "halves of characters are text", "archive/statement.py", '        json.dumps(said, ensure_ascii=False).encode()\n', ''),
    Mutant("test_archive.py::test_whatever_a_step_raises_it_is_wrong_in_words", "what a step raises ends the check", "archive/check.py", '    except BROKEN as error:', '    except ZeroDivisionError as error:'),
    Mutant("test_archive.py::test_headers_made_to_break_a_reader_are_refused_in_a_sentence", "a broken header is a traceback", "archive/unpack.py", 'EOFError, OSError, ValueError, OverflowError,', 'EOFError, OSError, OverflowError,'),
    Mutant("test_archive.py::test_headers_made_to_break_a_reader_are_refused_in_a_sentence", "headers without end are a traceback", "archive/unpack.py", 'OverflowError, RecursionError, MemoryError,', 'OverflowError, MemoryError,'),
    Mutant("test_archive.py::test_metadata_that_cannot_be_right_are_refused", "misspelt keys of metadata pass", "archive/metadata.py", '        if key not in form:', '        if not form:'),
    Mutant("test_archive.py::test_metadata_that_cannot_be_right_are_refused", "a version may be any text", "archive/metadata.py", '_matches(VERSION)),', '_matches(r".*")),'),
    Mutant("test_archive.py::test_a_doi_that_cannot_be_written_everywhere_is_written_nowhere", "a DOI is written before the files can be made", "archive/metadata.py", '    # Everything is made before anything is written, and', '    write_atomic(root / SOURCE, tomlkit.dumps(document).encode())\n    # Everything is made before anything is written, and'),
    # Outputs
    Mutant("test_verify.py::test_an_edited_output_is_named", "outputs are not compared", "archive/verify.py", "elif sha256(path) == bound[name]:", "elif bound[name]:"),
    Mutant("test_verify.py::test_a_missing_and_an_added_output_are_named", "an output nobody bound passes", "archive/verify.py", "sorted({*bound, *manifest.names(root)})", "sorted(bound)"),
    Mutant("test_verify.py::test_a_number_that_was_bound_but_is_not_of_the_evidence_is_stale", "what is bound is believed", "archive/verify.py", "        rows += _generated(root)\n", "        pass\n"),
    Mutant("test_verify.py::test_evidence_is_said_to_be_forged_edited_stale_or_not_run", "stale claims are intact", "archive/verify.py", '"stale": STALE, "missing"', '"stale": INTACT, "missing"'),
    Mutant("test_verify.py::test_a_broken_seal_is_named_file_by_file_and_stops_nothing_from_being_said", "the seal is not asked", "archive/verify.py", "for sentence in seal.differences(root):", "for sentence in ():"),
    Mutant("test_verify.py::test_a_number_of_the_readme_is_written_as_the_evidence_has_it", "README's numbers stay as typed", "archive/readme.py", "    return MARKED.sub(written, text)", "    return text"),
    Mutant("test_verify.py::test_what_goes_to_tex_is_text", "a device's name is TeX", "paper/numbers.py", 'out[f"{claim}.device"] = escape(" and ".join(cards))', 'out[f"{claim}.device"] = " and ".join(cards)'),
    Mutant("test_verify.py::test_a_record_without_what_is_shown_of_it_is_named_in_a_sentence", "a traceback for a bad row", "selfcheck/harness/states.py", "    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:\n        raise SelfcheckError(\n            f\"{what}", "    except ZeroDivisionError as error:\n        raise SelfcheckError(\n            f\"{what}"),
    # Isolation
    Mutant(ISOLATION + "test_nothing_outside_the_tree_stands_in_for_it", "byte code is read", ISOLATED, "        return self.source_to_code(data, self.path)", "        return super().get_code(fullname)"),
    Mutant(ISOLATION + "test_nothing_outside_the_tree_stands_in_for_it", "sitecustomize runs", ISOLATED, "    site.execsitecustomize = site.execusercustomize = lambda: None  # type: ignore[attr-defined]\n", ""),
    Mutant(ISOLATION + "test_nothing_outside_the_tree_stands_in_for_it", "src stays a place of modules", ISOLATED, "if entry and Path(entry).resolve() not in ours]", "if entry]"),
    Mutant(ISOLATION + "test_variables_that_reach_into_a_library_are_dropped_and_the_machines_are_kept", "variables passed on", ISOLATED, "if not DROPPED.match(name)}", "if name}"),
    Mutant(ISOLATION + "test_a_run_without_assertions_is_refused", "-O accepted", ISOLATED, "    if sys.flags.optimize:", "    if False:"),
    Mutant(ISOLATION + "test_the_bytes_that_are_compiled_are_checked_each_time", "bytes compiled unseen", ISOLATED, "            if wrong:\n", "            if False:\n"),
    Mutant(ISOLATION + "test_the_bytes_that_are_compiled_are_checked_each_time", "other finders asked for what the tree lacks", ISOLATED, "            raise ModuleNotFoundError(f", "            return None and ModuleNotFoundError(f"),
    Mutant(ISOLATION + "test_what_is_compiled_is_what_is_sealed", "any lock for a child", ISOLATED, '    if option and option != f"--lock={digest}":', "    if False:"),
    Mutant(ISOLATION + "test_a_module_is_one_file_of_the_tree", "links followed", ISOLATED, "        if step.is_symlink():", "        if False:"),
    Mutant(ISOLATION + "test_a_module_is_one_file_of_the_tree", "a folder beside a module", ISOLATED, "    if file.is_file() and path.exists():", "    if False:"),
    Mutant(ISOLATION + "test_loaded_modules_are_the_trees", "modules from elsewhere", ISOLATED, " or Path(file) != expected:", ":"),
    Mutant(ISOLATION + "test_what_does_not_belong_in_a_sealed_folder_is_named", "anything may lie beside", "selfcheck/harness/seal.py", "    found += _unexpected(root, files)\n", ""),
    Mutant(ISOLATION + "test_links_are_named_though_the_bytes_are_the_same", "links in a folder pass", "selfcheck/harness/seal.py", "                if path.is_symlink():", "                if False:"),
    Mutant(ISOLATION + "test_every_file_that_a_number_rests_on_is_sealed", "how git hands files out is not sealed", "selfcheck/harness/seal.py", ', "noxfile.py", ".gitattributes",', ', "noxfile.py",'),
    Mutant(ISOLATION + "test_an_edit_during_a_run_keeps_no_record", "sealed again during a run", "selfcheck/harness/seal.py", 'here.lock not in ("", sha256(root / LOCK)):', "False:"),
    Mutant(ISOLATION + "test_an_edit_during_a_run_keeps_no_record", "an edit while a claim is measured", "selfcheck/harness/worker.py", """    seal.verify(consequence=f"what was measured of {claim['id']} is not kept")\n""", ""),
    Mutant(ISOLATION + "test_no_check_rests_on_an_assertion_that_python_may_leave_out", "a check asserts", THEOREM, "    if first != second:\n", "    assert first == second\n    if first != second:\n"),
    Mutant(ISOLATION + "test_nox_stops_at_the_first_error", "nox goes on after an error", "noxfile.py", "nox.options.stop_on_first_error = True", "nox.options.stop_on_first_error = False"),
    Mutant(ISOLATION + "test_figures_and_paper_verify_the_seal_first", "figures drawn under any seal", "figures/__main__.py", "    seal.verify()\n", ""),
    Mutant(ISOLATION + "test_figures_and_paper_verify_the_seal_first", "paper built under any seal", "paper/__main__.py", "    seal.verify()\n", ""),
    Mutant(ISOLATION + "test_a_users_settings_change_no_byte_of_a_figure", "a user's matplotlibrc", "figures/__main__.py", 'os.environ["MPLCONFIGDIR"] = folder\n        os.chdir(folder)  # It is looked at first, when matplotlib is imported.\n        try:\n            import matplotlib\n\n            with matplotlib.rc_context():\n                matplotlib.rcdefaults()\n', 'os.environ.setdefault("MPLCONFIGDIR", "")\n        try:\n            import matplotlib\n\n            with matplotlib.rc_context():\n'),
    Mutant(ISOLATION + "test_pdflatex_sees_no_style_but_its_own", "TeX with the user's variables", TEX, "        env = {**environment(Path(home)),", "        env = {**os.environ,"),
    Mutant(ISOLATION + "test_pdflatex_reads_and_writes_in_its_folder_only", "TeX reads anything", TEX, "        if strangers := _read_elsewhere(folder, Path(home)):", "        if False:"),
    Mutant(ISOLATION + "test_pdflatex_reads_and_writes_in_its_folder_only", "TeX runs programs", TEX, '"-no-shell-escape"', '"-shell-escape"'),
    Mutant(ISOLATION + "test_what_pdflatex_warns_of", "a paper with a reference to nothing", TEX, "any(word in line for word in LOOSE)", "False"),
    Mutant(ISOLATION + "test_what_pdflatex_warns_of", "a table that reaches into the margin", TEX, "        if line.startswith(TOO_WIDE):", "        if False:"),
    Mutant(ISOLATION + "test_what_pdflatex_warns_of", "a table that covers its page's number", TEX, "        if TOO_LARGE in line:", "        if False:"),
    Mutant(ISOLATION + "test_the_paper_is_dated_by_no_wrong_clock", "any date", TEX, "    if not DATES[0].timestamp() <= epoch < DATES[1].timestamp():", "    if False:"),
    Mutant(REPLAYS + "test_what_changes_a_model_under_generate_is_seen", "nobody looks whether the model changed", REPLAYING, "if self.state.unchanged():", "if True:"),
    Mutant(REPLAYS + "test_what_changes_a_model_under_generate_is_seen", "hooks that come are not seen", STATE, "and not any(self.empty)", ""),
    Mutant(REPLAYS + "test_what_changes_a_model_under_generate_is_seen", "weights that moved are not seen", STATE, "and self.places == [x.data_ptr() for x in self.weights]", ""),
    Mutant(REPLAYS + "test_what_changes_a_model_under_generate_is_seen", "attributes that were replaced are not seen", STATE, "and all(map(is_, self._now(), self.held))", ""),
    Mutant(REPLAYS + "test_a_model_that_never_stops_changing_is_left_alone", "captured again for ever", REPLAYING, "if self.changes == MOST_CHANGES:", "if False:"),
    Mutant(REPLAYS + "test_a_replay_that_is_wrong_late_is_found_and_said", "never proven again", REPLAYING, "if self.replays == self.again:", "if False:"),
    Mutant(REPLAYS + "test_a_replay_that_is_wrong_at_once_is_never_used", "replays are not compared", REPLAYING, "if not same(replayed, output if expected is None else expected):", "if False:"),
    Mutant(REPLAYS + "test_compiled_steps_that_are_too_far_from_the_model_are_not_used", "any compiled step is used", REPLAYING, "not (off := distance(replayed, output)) <= ROUNDING", "(off := distance(replayed, output)) < 0"),
    Mutant("test_workspaces.py::test_work_spaces_are_new_before_and_gone_after_whatever_happens", "work space of a graph stays with its stream", "src/qaxis/cuda/workspaces.py", "    finally:\n        torch._C._cuda_clearCublasWorkspaces()", "    finally:\n        pass"),
    Mutant("test_workspaces.py::test_no_graph_is_captured_without", "captured with whatever work space there is", CAPTURED, "                own_workspaces(),\n", ""),
    Mutant(REPLAYS + "test_autocast_and_observers_are_seen", "observers are passed by", REPLAYING, "watched = bool(recorders.current()) or observing.anybody()", "watched = bool(recorders.current())"),
    Mutant(REPLAYS + "test_a_dense_layer_over_codes_is_told_before_anything_is_captured", "a dense layer over codes is captured", REPLAYING, "if isinstance(cache, Int8Cache) and any(", "if False and any("),
    Mutant(REPLAYS + "test_padding_is_captured_wherever_there_is_a_mask", "no padding is captured where there is none yet", REPLAYING, "if pads is None and kwargs.get(MASK) is not None:", "if False:"),
    Mutant(REPLAYS + "test_padding_is_told_before_every_replay", "padding is that of the capture", CAPTURED, "            self.pads.copy_((kwargs[MASK] == 0).sum(1))\n", "            pass\n"),
    Mutant(REPLAYS + "test_what_is_taken_back_is_appended_again_to_the_same_places", "what is taken back counts", CAPTURED, "    shared.rewind(mark)\n", ""),
    Mutant(REPLAYS + "test_logits_are_apart_by_how_they_spread", "logits are apart by the largest", CAPTURED, "/ (b - b.mean(-1, keepdim=True)).square()", "/ b.square()"),
    Mutant(REPLAYS + "test_long_prompts_go_in_chunks_only_where_it_cannot_matter", "chunks whatever the positions depend on", GENERATE, 'if each == "longrope" or "dynamic" in str(each):', "if False:"),
    Mutant(REPLAYS + "test_long_prompts_go_in_chunks_only_where_it_cannot_matter", "chunks of prompts that are no tokens", GENERATE, "if x is not None and name not in _IN_CHUNKS)", "if False)"),
    Mutant(REPLAYS + "test_long_prompts_go_in_chunks_only_where_it_cannot_matter", "chunks though hidden states are asked for", GENERATE, "    why = collects(model, [config])", "    why = \"\""),
    Mutant(REPLAYS + "test_prompts_of_models_with_a_recurrent_state_are_not_cut", "chunks though a state starts anew", GENERATE, "if not isinstance(layer, HoldingLayer) and not holds_nothing(layer):", "if False:"),
    Mutant(REPLAYS + "test_a_model_that_was_once_asked_for_hidden_states_is_replayed", "hooks that collect nothing are somebody's", STATE, 'is_ours(hook) or getattr(hook, "__module__", "") == _COLLECTING', "is_ours(hook)"),
    Mutant(REPLAYS + "test_nothing_is_captured_while_another_thread_generates", "captured beside another thread", REPLAYING, "others = bool(set(_generating.get(self.model.device, ())) - {get_ident()})", "others = False"),
    Mutant(REPLAYS + "test_counting_calls_is_no_change_of_a_model", "a count is a change", SETTINGS, "        module.__dict__.setdefault(CALLS, {})\n\n\ndef calls_of", "\n\ndef calls_of"),
    Mutant(REPLAYS + "test_what_was_cropped_is_read_by_nobody", "what was cropped stays", "src/qaxis/storage/in_place.py", "self.parts[name][:, :, length : self.length].zero_()", "pass"),
    Mutant(REPLAYS + "test_an_assistant_that_is_enabled_takes_back_what_it_drafted", "an assistant forgets what it drafted", GENERATE, "    if config.is_assistant:", "    if False:"),
    Mutant(REPLAYS + "test_caches_that_transformers_would_not_make_are_not_ours", "any cache is replaced", GENERATE, "    if config.cache_implementation is not None:", "    if False:"),
    Mutant(REPLAYS + "test_what_stands_for_a_method_goes_when_the_last_thread_does", "the first thread puts the method back", STAND_IN, "if there.users == 0 and model", "if model"),
    Mutant("test_routes.py::test_a_dense_layer_of_a_token_reads_all_places_and_sees_its_keys", "a dense token sees a place too many", "src/qaxis/models/decoding.py", "(places < rows[:, END, None])", "(places <= rows[:, END, None])"),
    Mutant("test_routes.py::test_a_token_of_dense_layers_reads_every_cache", "a dense token takes codes of few bits for numbers", STEPS, "isinstance(holder, KeyValues) and", "holder is not None and not holder.quantised and"),
    Mutant("test_routes.py::test_a_dense_step_is_of_keys_and_values_of_one_cache", "a dense token reads values that its cache does not hold", STEPS, " and getattr(v, HOLDER, None) is holder\n    steps", "\n    steps"),
    Mutant("test_full_cache.py::test_why_a_step_cannot_be_captured_is_said", "codes of float16 are captured", CACHES, "isinstance(layer, QuantizedLayer) and not layer.kv.quantised", "False"),
    Mutant(OF_MODELS + "test_where_no_group_is_complete_strict_mode_has_nothing_to_refuse", "strict mode asks for a completion of nothing", STEPS, "*(window for window in windows if window)]) < GROUP", "*(window for window in windows if window)]) < 0"),
    Mutant(OF_MODELS + "test_where_no_group_is_complete_strict_mode_has_nothing_to_refuse", "a complete group is not put back", STEPS, "*(window for window in windows if window)]) < GROUP", "*(window for window in windows if window)]) <= GROUP"),
    Mutant(OF_MODELS + "test_a_window_without_room_for_a_group_puts_nothing_back", "how many keys a window shows is not looked at", STEPS, "*(window for window in windows if window)]) < GROUP", "]) < GROUP"),
    Mutant(OF_MODELS + "test_a_step_that_can_complete_asks_for_moments_before_there_is_a_group", "moments are asked for when it is too late to make them", STEPS, 'settings.completion if _not_completed(q, k, v, shown, logits, settings) is None else "none"', '"none"'),
    Mutant(PREFILL + "test_parts_are_as_large_as_each_other", "seven heads and then one", "src/qaxis/prefill/plan.py", "    return -(-many // -(-many // at_once))\n", "    return at_once\n"),
)  # fmt: skip


def run(mutant: Mutant) -> tuple[bool, str]:
    """(caught, what the check said)."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "local")
                )
            else:
                shutil.copy(source, tree / name)
        target = tree / mutant.file
        text = target.read_text("utf-8")
        if mutant.old not in text:
            return False, f"{mutant.file} has no {mutant.old!r}; update tests/mutants.py"
        target.write_text(text.replace(mutant.old, mutant.new, 1), "utf-8")
        env = {
            **os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)]), "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        options = {"cwd": tree, "env": env, "capture_output": True, "text": True, "errors": "replace"}
        command = [sys.executable, "-m", "selfcheck"]
        subprocess.run([*command, "seal"], check=True, **options)  # type: ignore[call-overload]
        if "::" in mutant.by:
            command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{mutant.by}"]
        else:
            command += ["run", "--quick", "--only", mutant.by]
        done = subprocess.run(command, **options)  # type: ignore[call-overload]
    if "::" in mutant.by:
        said = re.findall(r"^(?:E  +|FAILED )(.*)$", done.stdout, re.MULTILINE)
        return done.returncode == 1 and bool(said), (said or [done.stdout[-300:]])[0]
    said = re.findall(r"FAILED \((.*)", done.stdout)
    return done.returncode != 0 and bool(said), (said or [done.stdout[-200:] + done.stderr[-300:]])[0]


def main() -> None:
    chosen = [
        Mutant(by, CONTROL, "noxfile.py", "import nox", "import nox") for by in dict.fromkeys(m.by for m in MUTANTS)
    ] + list(MUTANTS)
    chosen = [m for m in chosen if not sys.argv[1:] or any(a in f"{m.by} {m.fault}" for a in sys.argv[1:])]
    rows, survived = [], []
    with ThreadPoolExecutor(WORKERS) as pool:
        for i, (mutant, (caught, said)) in enumerate(zip(chosen, pool.map(run, chosen), strict=True), 1):
            if mutant.fault == CONTROL:
                caught, said = not caught, "no fault found" if not caught else said
            said = " ".join(said.split())[:110]
            print(
                f"[{i}/{len(chosen)}] {'ok' if caught else 'SURVIVED'}  {mutant.by}: {mutant.fault}: {said}",
                flush=True,
            )
            if mutant.fault != CONTROL:
                rows.append(
                    f"| {len(rows) + 1} | {mutant.fault} | `{mutant.file}` | `{mutant.by}` | {'yes' if caught else 'NO'} |"
                )
            if not caught:
                survived.append(mutant.fault)
    if len(rows) == len(MUTANTS):
        head = "# Deliberate faults, and the check that catches each\n\nWritten by `nox -s mutants`.\n\n"
        head += "| | fault | file | caught by | caught |\n|---|---|---|---|---|\n"
        write_atomic(TABLE, (head + "\n".join(rows) + "\n").encode())
    if survived:
        sys.exit(f"mutants: survived: {', '.join(survived)}")
    print(f"{len(rows)} faults, every one caught; {len(chosen) - len(rows)} controls without a fault passed")


if __name__ == "__main__":
    main()
