// What one launch asks of global memory, as one line of JSON: traffic key=value ...
//
//   stage=match|amend  dtype=bf16|fp16  batch=  num_kv_heads=  group_size=  head_dim=  page_size=  seq_len=
//   age=       0: every head misses; else every head reuses the entry of position seq_len - 1 - age
//   anchors=  window=, as many entries  band=  ctas=
//
// The answer is checked against the reference as well; the exit status tells.
#include <algorithm>
#include <cstdlib>
#include <map>

#include "amend_case.h"
#include "match_case.h"

namespace mac_attn::simt {
namespace {

class Arguments {
 public:
  Arguments(int argc, char** argv) {
    for (int i = 1; i < argc; ++i) {
      const std::string text = argv[i];
      const size_t equals = text.find('=');
      const std::string key = text.substr(0, equals);
      if (equals == std::string::npos || values_.count(key) == 0) {
        std::fprintf(stderr, "no such argument: %s\n", argv[i]);
        std::exit(2);
      }
      values_[key] = text.substr(equals + 1);
    }
  }
  const std::string& text(const char* key) const { return values_.at(key); }
  int number(const char* key) const { return std::atoi(values_.at(key).c_str()); }

 private:
  std::map<std::string, std::string> values_ = {
      {"stage", "amend"},  {"dtype", "bf16"},   {"batch", "1"},      {"num_kv_heads", "2"}, {"group_size", "4"},
      {"head_dim", "128"}, {"page_size", "16"}, {"seq_len", "1024"}, {"age", "0"},          {"anchors", "0"},
      {"window", "64"},    {"band", "64"},      {"ctas", "8"}};
};

template <typename Spec>
Spec spec_of(const Arguments& arguments) {
  Spec spec;
  spec.dtype = arguments.text("dtype") == "fp16" ? DType::kFloat16 : DType::kBFloat16;
  spec.num_kv_heads = arguments.number("num_kv_heads"), spec.group_size = arguments.number("group_size");
  spec.head_dim = arguments.number("head_dim");
  spec.band = arguments.number("band");
  spec.seq_lens.assign(arguments.number("batch"), arguments.number("seq_len"));
  return spec;
}

void run_match(const Arguments& arguments) {
  MatchSpec spec = spec_of<MatchSpec>(arguments);
  spec.near = spec.holes = 0, spec.gap = 1, spec.entries = spec.window = arguments.number("window");
  const int batch = arguments.number("batch"), age = arguments.number("age");
  spec.splits = std::max(1, arguments.number("ctas") / (batch * spec.num_kv_heads));
  MatchCase match(spec);
  for (int b = 0; b < batch; ++b) {
    for (int h = 0; h < spec.num_kv_heads; ++h) {
      *match.ring.view().stored(match.slots[b], h) = spec.entries;  // all places are taken
      if (age > 0) match.set_entry(b, h, match.ring.place(match.slots[b], h, age - 1), 0);
    }
  }
  reset_counters();
  match.run();
  match.check();
  CHECK(match.count_hits() == (age > 0 ? batch * spec.num_kv_heads * spec.group_size : 0));
}

void run_amend(const Arguments& arguments) {
  AmendSpec spec = spec_of<AmendSpec>(arguments);
  spec.page_size = arguments.number("page_size"), spec.anchors = arguments.number("anchors");
  spec.ages = {arguments.number("age")}, spec.ctas = arguments.number("ctas");
  spec.full_lists = true;
  AmendCase amend(spec);
  CHECK((amend.start(0, 0) > 0) == (spec.ages[0] > 0));
  reset_counters();
  amend.run();
  amend.check();
}

void print(const Counters& c) {
  std::printf(
      "{\"async_copy_bytes\": %lld, \"async_zero_bytes\": %lld, \"load_stream_bytes\": %lld, "
      "\"load_bytes\": %lld, \"store_bytes\": %lld, \"atomics\": %lld, \"matrix_products\": %lld}\n",
      static_cast<long long>(c.async_copy_bytes), static_cast<long long>(c.async_zero_bytes),
      static_cast<long long>(c.load_stream_bytes), static_cast<long long>(c.load_bytes),
      static_cast<long long>(c.store_bytes), static_cast<long long>(c.atomics),
      static_cast<long long>(c.matrix_products));
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using namespace mac_attn::simt;
  const Arguments arguments(argc, argv);
  arguments.text("stage") == "match" ? run_match(arguments) : run_amend(arguments);
  print(counters());
  return failed_checks == 0 ? 0 : 1;
}
