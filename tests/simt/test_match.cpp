// match_kernel: test_simt_match shapes|mixes|errors|schedules DTYPE
#include "match_case.h"

#include <cmath>

namespace mac_attn::simt {
namespace {

std::vector<Run> one_run() {
  static uint64_t seed = 0;
  return {{Engine::kFibers, ++seed}};
}

// Returns the number of query heads that hit.
int test(const MatchSpec& spec, const std::vector<Run>& runs) {
  const CaseReport report(spec.name());
  MatchCase match(spec);
  for (const Run& run : runs) {
    const CaseReport schedule(name_of(run));
    match.run(run);
    match.check();
  }
  return match.count_hits();
}

void test_shapes(DType dtype) {
  MatchSpec spec;
  spec.dtype = dtype;
  int hits = 0, heads = 0;
  for (const int head_dim :
       {64, 80, 96, 128, 256, 512, 8, 24, 40, 72, 88, 104, 112, 120, 136, 160, 192, 200, 248}) {
    for (const int group_size : {1, 3, 5, 8, 16, 32}) {
      spec.head_dim = head_dim, spec.group_size = group_size;
      spec.num_kv_heads = 1 + static_cast<int>(spec.seed % 2);
      spec.relative = spec.seed % 3 != 0, spec.per_head = spec.seed % 4 == 3;
      spec.splits = 1 + static_cast<int>(spec.seed % 3);
      spec.request_ids = spec.seed % 5 != 0;
      spec.max_drift = spec.seed % 2 ? 3 : 0;
      ++spec.seed;
      if (kFewShapes && (spec.seed + spec.seed / 6) % 3) continue;
      hits += test(spec, one_run());
      heads += 3 * spec.num_kv_heads * group_size;
    }
  }
  CHECK(hits > heads / 4 && hits < heads);
}

void test_mixes(DType dtype) {
  MatchSpec spec;
  spec.dtype = dtype;
  for (const bool per_head : {false, true}) {
    for (const int splits : {1, 2, 7}) {
      for (const int group_size : {1, 12}) {
        spec.per_head = per_head, spec.splits = splits, spec.group_size = group_size;
        spec.twins = false, ++spec.seed, test(spec, one_run());
        spec.twins = true, ++spec.seed;
        if (kFewShapes) continue;  // what follows has other numbers
        test(spec, one_run());
        spec.max_reuse_depth = 3, ++spec.seed, test(spec, one_run());
        spec.max_reuse_depth = 1 << 30;
      }
    }
  }
  // Entries of many rounds for each warp, a single one; a window that ends before them.
  for (const int entries : {200, 1, 7}) {
    spec.entries = entries, spec.seq_lens = {400, 120, 18, 17, 16, 1, 2}, spec.group_size = 2, spec.near = 0.02;
    spec.num_kv_heads = 1;
    for (const bool per_head : {false, true}) {
      for (const int splits : {1, 3}) {
        spec.per_head = per_head, spec.splits = splits, spec.gap = splits, spec.window = splits == 1 ? 30 : 1000;
        ++spec.seed, test(spec, one_run());
      }
    }
  }
  // Anchors, which shorten the reach in a short context.
  for (const int anchors : {1, 8, 300}) {
    spec = {};
    spec.dtype = dtype, spec.anchors = anchors, spec.seq_lens = {400, 120, 60, 33, 32, 17}, spec.band = 10;
    spec.near = 0.5, spec.seed += anchors;
    CHECK(test(spec, one_run()) > 0);
  }
  // Several query tokens: a head hits with all of them or with none.
  for (const int tokens : {2, 4, 16}) {
    for (const bool per_head : {false, true}) {
      spec = {};
      spec.dtype = dtype, spec.tokens = tokens, spec.per_head = per_head, spec.seed = 70 + tokens + per_head;
      spec.seq_lens = {90, tokens, 0, 41 + tokens, 70, 160}, spec.entries = 80, spec.window = 100;
      spec.near = 1, spec.gap = 1, spec.min_context = tokens == 4 ? 88 : 1;
      for (const int splits : {1, 3}) {
        spec.splits = splits, spec.query_lens = {};
        const int all = test(spec, splits == 3 && tokens == 2 ? all_runs() : one_run());
        CHECK(all > 0 && all % tokens == 0);
        spec.query_lens = {tokens, 1, kGarbage, tokens, 1, (tokens + 1) / 2};
        CHECK(test(spec, one_run()) > 0);
      }
      spec.anchors = per_head ? 0 : 8, ++spec.seed, test(spec, one_run());
      spec.near = 0.05;  // some token has none
      ++spec.seed, test(spec, one_run());
    }
  }
  // More CTAs than candidates.
  spec = {};
  spec.dtype = dtype, spec.splits = 32, test(spec, one_run());
  // All miss, all hit.
  spec = {};
  spec.dtype = dtype, spec.near = 0, spec.holes = 0, spec.seq_lens = {90, 120};
  CHECK(test(spec, one_run()) == 0);
  spec.near = 1;
  CHECK(test(spec, one_run()) == 12);
  spec.min_context = 91;
  CHECK(test(spec, one_run()) == 6);
  spec.min_context = 1, spec.rho = 0;
  CHECK(test(spec, one_run()) == 0);
  spec.rho = INFINITY;
  CHECK(test(spec, one_run()) == 0);
  // The largest group; no distance at all.
  spec.rho = 0.2, spec.group_size = cuda::kMaxGroup, spec.num_kv_heads = 1, spec.seq_lens = {60};
  for (const bool per_head : {false, true}) spec.per_head = per_head, test(spec, one_run());
  spec.head_dim = 512, spec.group_size = cuda::max_group(512), spec.per_head = false, test(spec, one_run());
}

// What a single head or entry does to a decision.
void test_numbers(DType dtype) {
  for (const bool per_head : {false, true}) {
    for (const bool relative : {false, true}) {
      MatchSpec spec;
      spec.dtype = dtype, spec.per_head = per_head, spec.relative = relative, spec.near = 0.6, spec.splits = 2;
      const auto changed = [&](const char* what, auto change) {
        const CaseReport report(what);
        MatchCase match(spec);
        change(match);
        match.run(one_run()[0]);
        match.check();
      };
      changed("NaN in a query", [](MatchCase& m) { m.query().set(0, 1, 63, NAN); });
      changed("infinity in a query", [](MatchCase& m) { m.query().set(1, 4, 0, -INFINITY); });
      changed("a threshold of 0", [](MatchCase& m) { m.thresholds[2] = 0; });
      changed("a threshold below 0", [](MatchCase& m) { m.thresholds[1] = -1; });
      changed("a threshold of NaN", [](MatchCase& m) { m.thresholds[3] = NAN; });
      const int spec_entries = spec.entries;
      changed("entries with NaN and infinity", [&](MatchCase& m) {
        for (int place = 0; place < spec_entries; place += 5) {
          uint16_t* row = m.ring.view().query<uint16_t>(m.slots[0], place % 2, place);
          row[7] = place % 4 ? 0x7fff : 0xff80;
        }
      });
      changed("another request's slot", [](MatchCase& m) { ++*m.ring.view().request(m.slots[0]); });
      changed("a broken history",
              [](MatchCase& m) { --*m.ring.view().end(m.slots[1]), ++*m.ring.view().end(m.slots[3]); });
      changed("a count out of range", [](MatchCase& m) {
        *m.ring.view().stored(m.slots[0], 0) = 2 * m.ring.layout.shape.entries;
        *m.ring.view().stored(m.slots[0], 1) = 0;
        *m.ring.view().stored(m.slots[1], 1) = -5;
      });
    }
  }
}

void test_errors(DType dtype) {
  MatchSpec spec;
  spec.dtype = dtype, spec.near = 0.5;
  const int many_splits = 3;
  for (int i = 0; i < 6; ++i) {
    spec.splits = i % 2 ? many_splits : 1, spec.per_head = i / 2 == 1, spec.tokens = i < 4 ? 1 : 3;
    const auto broken = [&](const char* what, auto change) {
      const CaseReport report(what);
      MatchCase match(spec);
      change(match);
      match.run(one_run()[0]);
      match.check();
    };
    broken("slot too large", [](MatchCase& m) { m.slots[0] = m.ring.num_slots, m.errors[0] = cuda::kBadSlot; });
    broken("garbage slot", [](MatchCase& m) { m.slots[3] = kGarbage, m.errors[3] = cuda::kBadSlot; });
    broken("negative slot", [](MatchCase& m) { m.slots[1] = -2, m.errors[1] = cuda::kBadSlot; });
    broken("no slot", [](MatchCase& m) { m.slots[1] = m.slots[3] = kNoSlot; });
    broken("one slot twice",
           [](MatchCase& m) { m.slots[1] = m.slots[3], m.errors[1] = m.errors[3] = cuda::kBadSlot; });
    broken("padding may name a slot", [](MatchCase& m) { m.slots[2] = m.slots[0]; });
    broken("negative length", [](MatchCase& m) { m.seq_lens[0] = -4, m.errors[0] = cuda::kBadLength; });
    if (spec.tokens > 1)
      broken("too short", [](MatchCase& m) { m.seq_lens[0] = 2, m.errors[0] = cuda::kBadLength; });
    broken("two errors", [](MatchCase& m) {
      m.seq_lens[3] = -1, m.slots[3] = -2, m.errors[3] = cuda::kBadLength | cuda::kBadSlot;
    });
  }
}

void test_schedules(DType dtype) {
  MatchSpec spec;
  spec.dtype = dtype, spec.near = 0.4, spec.twins = true, spec.seq_lens = {90, 41}, spec.num_kv_heads = 1;
  spec.splits = 2, test(spec, all_runs());
  spec.per_head = true, spec.group_size = 2, test(spec, all_runs());
  spec.per_head = false, spec.splits = 1, spec.group_size = 5, spec.head_dim = 128, test(spec, all_runs());
}

}  // namespace
}  // namespace mac_attn::simt

int main(int argc, char** argv) {
  using namespace mac_attn;
  if (argc != 3) return 2;
  const std::string part = argv[1];
  const DType dtype = std::string(argv[2]) == "fp16" ? DType::kFloat16 : DType::kBFloat16;
  if (part == "shapes") simt::test_shapes(dtype);
  if (part == "mixes") simt::test_mixes(dtype);
  if (part == "mixes" && !simt::kFewShapes) simt::test_numbers(dtype);  // numbers order no accesses
  if (part == "errors") simt::test_errors(dtype);
  if (part == "schedules") simt::test_schedules(dtype);
  return simt::test_result(("match " + part).c_str());
}
