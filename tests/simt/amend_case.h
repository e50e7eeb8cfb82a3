// One call of amend: a random case, the launch, the comparison.
#pragma once

#include "kernel_case.h"

namespace mac_attn::simt {

struct AmendSpec {
  DType dtype = DType::kBFloat16;
  int num_kv_heads = 2, group_size = 3, head_dim = 64, page_size = 16;
  std::vector<int> seq_lens = {150, 37};
  bool hnd = false;
  bool exact = false;  // without reuse
  int window = 40, band = 24, anchors = 0;
  // For (request, KV head) after another, or (request, query head), over and over: the age of the entry that is
  // reused, 0 for a miss. A hit that this request cannot have is a miss.
  std::vector<int> ages = {0};
  bool per_head = false;
  bool anchor_holes = true;  // some places of an inherited list of anchors are not used
  double soft_cap = 0;
  double sharpness = 1;  // standard deviation of a logit
  int heavy_tokens = 0;  // of each KV head: tokens whose logit for one of the heads is far above the others
  int ctas = 3;
  std::vector<int> without_ring = {};  // requests that have no slot
  uint64_t seed = 1;                   // of the data

  std::string name() const;
};

class AmendCase {
 public:
  explicit AmendCase(const AmendSpec& spec);

  void run(const Run& run = {Engine::kFibers, 1});
  // Everything that the last run must have fulfilled. Requests with bits in `errors` have answered NaN.
  void check() const;

  // For tests that break something, before run().
  Pages& pages() { return pages_; }
  std::vector<int32_t> seq_lens, status;
  std::vector<int32_t> errors;                // [B] Error bits that amend has to find, or finds in `status`
  int start(int request, int kv_head) const;  // first token that is read, other than anchors
  AmendParams params();
  const std::vector<int32_t>& anchors() const { return anchors_; }

 private:
  void check_request(int request) const;
  void check_nan(int request) const;
  void check_head(int request, int head, const std::vector<int>& anchors) const;
  cuda::AmendWorkspace workspace();
  int heads() const { return spec_.num_kv_heads * spec_.group_size; }
  bool exact(int request) const { return spec_.exact || slots_[request] == kNoSlot; }
  int64_t entry(int request, int kv_head) const;  // index in the ring's anchors, of the matched entry

  AmendSpec spec_;
  Data data_;
  reference::Softmax softmax_;
  HeadsTensor query_;
  Pages pages_;
  int num_slots_;
  std::vector<int32_t> slots_, source_, ring_anchors_;
  std::vector<std::vector<reference::Rows>> keys_, values_;  // by request and KV head
  std::vector<float> out_, lse_;
  std::vector<int32_t> anchors_, done_, drawn_, error_flag_;
  std::vector<uint8_t> strip_bin_;
  std::vector<uint16_t> token_weight_;
  std::vector<float> partial_out_, partial_max_, partial_sum_, strip_logit_, strip_max_;
  int32_t expected_flag_ = 0;
  Unchanged unchanged_;
};

}  // namespace mac_attn::simt
