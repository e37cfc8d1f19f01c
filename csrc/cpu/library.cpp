// Registers the operators as `torch.ops.skipkv_cpu.*`; `skipkv_vllm/ops/native.py` loads them. The schemas are those of
// `skipkv_vllm/ops/schema.py`, which a test compares.
#include "ops.h"

STABLE_TORCH_LIBRARY(skipkv_cpu, m) {
  m.def(
      "score_tokens(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, "
      "Tensor num_resident, Tensor queries, Tensor? penalty, int pool, float mix, float threshold) -> Tensor");
  m.def(
      "measure_attention(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor positions, "
      "Tensor num_resident, Tensor queries, Tensor num_queries, Tensor newest, bool output_error) -> Tensor");
  m.def(
      "key_similarity(Tensor[] caches, Tensor pointers, int layout, Tensor table, Tensor num_resident, int length) "
      "-> Tensor");
  m.def(
      "select_keep(Tensor scores, Tensor positions, Tensor num_resident, Tensor num_keep, Tensor pin_below, "
      "Tensor pin_from, int max_moves) -> (Tensor source, Tensor hole, Tensor count)");
  m.def(
      "compact_pages(Tensor(a!)[] caches, Tensor pointers, int layout, Tensor(b!) sidecar, Tensor positions, "
      "Tensor source_table, Tensor target_table, Tensor num_keep, Tensor source, Tensor hole, Tensor count) -> ()");
  m.def(
      "track_sentences(Tensor token_ids, Tensor? hidden, Tensor spans, int num_tokens, Tensor delimiters, bool merge, "
      "Tensor(a!) ends, Tensor(b!) count, Tensor(c!) after_delimiter, Tensor(d!) open_length, Tensor(e!) open_sum, "
      "Tensor(f!) embeddings, Tensor(g!) text) -> ()");
  m.def(
      "sentence_similarity(Tensor embeddings, Tensor slots, Tensor count, Tensor(a!) compared, "
      "Tensor(b!) penalties, float threshold, int rule) -> ()");
  m.def("held_positions(Tensor sidecar, Tensor table, Tensor num_placed, Tensor num_evicted, int length) -> Tensor");
  m.def("token_penalties(Tensor ends, Tensor penalties, Tensor first, Tensor slots, Tensor positions) -> Tensor");
  m.def("observe_queries(Tensor query, Tensor index, Tensor(a!) rows) -> ()");
  m.def(
      "track_thoughts(Tensor token_ids, Tensor spans, Tensor vocabulary, Tensor keywords, bool merge, int interval, "
      "Tensor strengths, Tensor(a!) state, int written, Tensor(b!) row, Tensor(c!) coefficient) -> ()");
  m.def("steer_add(Tensor hidden, Tensor coefficient, Tensor row, Tensor vectors) -> Tensor");
  m.def("limit_isa(int level) -> int");
  m.def("score_scratch(int length, int dim, int window, int group) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(skipkv_cpu, CPU, m) {
  m.impl("score_tokens", TORCH_BOX(&skipkv::score_tokens));
  m.impl("measure_attention", TORCH_BOX(&skipkv::measure_attention));
  m.impl("key_similarity", TORCH_BOX(&skipkv::key_similarity));
  m.impl("select_keep", TORCH_BOX(&skipkv::select_keep));
  m.impl("compact_pages", TORCH_BOX(&skipkv::compact_pages));
  m.impl("track_sentences", TORCH_BOX(&skipkv::track_sentences));
  m.impl("sentence_similarity", TORCH_BOX(&skipkv::sentence_similarity));
  m.impl("held_positions", TORCH_BOX(&skipkv::held_positions));
  m.impl("token_penalties", TORCH_BOX(&skipkv::token_penalties));
  m.impl("observe_queries", TORCH_BOX(&skipkv::observe_queries));
  m.impl("track_thoughts", TORCH_BOX(&skipkv::track_thoughts));
  m.impl("steer_add", TORCH_BOX(&skipkv::steer_add));
}

STABLE_TORCH_LIBRARY_IMPL(skipkv_cpu, CompositeExplicitAutograd, m) {
  m.impl("limit_isa", TORCH_BOX(&skipkv::limit_isa));
  m.impl("score_scratch", TORCH_BOX(&skipkv::score_scratch));
}
