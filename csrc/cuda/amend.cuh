// Amend on the GPU: split-KV decode attention over the tokens that reuse does not cover.
//
//   a miss:              old = state([0, E(p)), sampled meanwhile    fresh = state([E(p), n))
//   a hit:               old = state([E(c), E(p)))                   fresh = state([E(p), n))
//   a hit with anchors:  old = state of the entry's query(anchors)   fresh = state(anchors and [E(c), n))
//                        both from the same rows in shared memory; of the largest heads one after the other
//
// Grid: persistent, see schedule.cuh. Four warps a CTA; of each tile of 64 tokens every warp takes 16, with
// a cp.async pipeline of its own straight from the pages (stage.cuh) and without a barrier of the block.
// Traffic: the K and V rows of [s, n) and of the anchors, once per pass (most_tile_heads), of the largest heads the
// anchors' twice (anchors_twice); the partial states; the candidates.
//
// Q is the queries' type, T what the cache holds: the same, or fp8.
#pragma once

#include <type_traits>

#include "finish.cuh"
#include "ptx/barrier.h"
#include "warp_state.cuh"

namespace mac_attn::cuda {

// The query lies behind the stages, then that of the entry: [8 kHeadBlocks, D] each.
template <int kHeadDim, int kHeadBlocks>
constexpr int kQueryElements = 8 * kHeadBlocks * WarpState<bf16, kHeadDim, kHeadBlocks>::kQueryRow;

template <int kHeadDim, int kHeadBlocks, typename T = bf16>
constexpr int amend_shared_bytes() {
  return kWarps * Stage<kHeadDim, T>::kCount * Stage<kHeadDim, T>::kBytes +
         2 * 2 * kQueryElements<kHeadDim, kHeadBlocks>;
}

// Blocks of eight query heads that a pass over `queries` of a KV head has.
constexpr int head_blocks(int head_dim, int queries) {
  const int most = most_tile_heads(head_dim), heads = queries < most ? queries : most;
  return heads > 16 ? 4 : heads > 8 ? 2 : 1;
}
// Of those, as many as a hit with anchors can be served with: with more than two, or two of large heads, there are
// no registers left for what it needs besides, see Replaced.
constexpr int hit_blocks(int head_dim, int blocks) {
  const int most = most_replaced_heads(head_dim) / 8;
  return blocks < most ? blocks : most;
}
// Calls `use` with head_blocks as a type with that `value`.
template <int kHeadDim, typename Use>
auto with_head_blocks(int queries, const Use& use) {
  const int blocks = head_blocks(kHeadDim, queries);
  if constexpr (most_tile_heads(kHeadDim) > 16) {
    if (blocks == 4) return use(std::integral_constant<int, 4>());
  }
  if constexpr (most_tile_heads(kHeadDim) > 8) {
    if (blocks == 2) return use(std::integral_constant<int, 2>());
  }
  return use(std::integral_constant<int, 1>());
}

// Calls `launch` with how many queries of a KV head a kernel is to serve and which units it does: one kernel does
// all, but with anchors where the kernel of several tokens serves no hits; those are one token's. Answers the first
// error.
template <typename Launch>
auto each_amend_launch(const AmendParams& p, const Launch& launch) {
  const int D = padded_head_dim(p.shape), queries = p.shape.group_queries();
  const int blocks = head_blocks(D, queries);
  if (p.num_anchors == 0 || hit_blocks(D, blocks) == blocks) return launch(queries, Serves::kAll);
  if (const auto error = launch(queries, Serves::kMisses)) return error;
  return launch(p.shape.group_size, Serves::kHits);
}

// Areas of shared memory, each of a stage's size.
struct Scratch {
  unsigned char* base;
  int stride;  // bytes from one to the next
  MAC_DEVICE void* area(int i) const { return base + i * stride; }
};

// Merges the four warps' states through the stages they have just read and writes the piece's partial
// state. Every thread of the block comes here at the same tile. `value_scale`: of the values, with fp8.
// kExact makes its shared memory one kernel's own: what two share nvcc lays out in another order in both.
template <bool kExact, typename T, int kHeadDim, int kHeadBlocks, bool kReplaced>
MAC_DEVICE void write_partial(const AmendWorkspace& w, WarpState<T, kHeadDim, kHeadBlocks, kReplaced>& state,
                              const Scratch& scratch, int64_t partial, [[maybe_unused]] float value_scale) {
  constexpr int kRow = (kHeadDim + 31) / 32 * 32;  // floats
  constexpr int kHeads = 8 * kHeadBlocks;
  // Blocks of heads whose states fit a stage together: of fp8 two may not.
  constexpr int kAtOnce = kHeads * kRow * 4 <= Stage<kHeadDim, T>::kBytes ? kHeadBlocks : 1;
  static_assert(kAtOnce * 8 * kRow * 4 <= Stage<kHeadDim, T>::kBytes, "a state fits a stage");
  __shared__ float4 warp_sums[kWarps][kHeads];
  // Columns are shuffled within 32, so that the four heads that a warp writes at a time lie in different banks.
  const auto place = [](int head, int column) {
    return (kAtOnce == kHeadBlocks ? head : head % 8) * kRow + (column ^ head / 2 % 4 * 8);
  };
  const int lane = ptx::lane_id(), warp = threadIdx.x / 32;
  const int heads = w.tile_heads < kHeads ? w.tile_heads : kHeads;
  float* mine = static_cast<float*>(scratch.area(warp));
#pragma unroll
  for (int block = 0; block < kHeadBlocks; block += kAtOnce) {
    if (block > 0) ptx::sync_block();  // all have read the last one's
#pragma unroll
    for (int b = block; b < block + kAtOnce; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = b * 8 + lane % 4 * 2 + i;
        for (int distance = 4; distance < 32; distance *= 2) {
          state.sum[b][i] += ptx::shfl_xor(state.sum[b][i], distance);
          state.light[b][i] += ptx::shfl_xor(state.light[b][i], distance);
        }
        const auto anchors = static_cast<float>(state.anchors);
        if (lane < 4) warp_sums[warp][head] = {state.max[b][i], state.sum[b][i], state.light[b][i], anchors};
#pragma unroll
        for (int s = 0; s < kHeadDim / 16; ++s) {
          const int first = kIsFp8<T> ? lane / 4 * 2 : lane / 4, step = kIsFp8<T> ? 1 : 8;
          mine[place(head, s * 16 + first)] = state.out[b][s][i];
          mine[place(head, s * 16 + first + step)] = state.out[b][s][2 + i];
        }
      }
    }
    ptx::sync_block();
    const int end = kAtOnce == kHeadBlocks || heads < 8 * (block + 1) ? heads : 8 * (block + 1);
#pragma unroll 1
    for (int i = threadIdx.x + 8 * block * (kHeadDim / 4); i < end * (kHeadDim / 4); i += kThreads) {
      const int head = i / (kHeadDim / 4), d = i % (kHeadDim / 4) * 4;
      float4 sums{-INFINITY, 0.f, 0.f, 0.f}, out{0.f, 0.f, 0.f, 0.f};
      for (int j = 0; j < kWarps; ++j) sums.x = fmaxf(sums.x, warp_sums[j][head].x);
      for (int j = 0; j < kWarps; ++j) {
        const float4 warp_sum = warp_sums[j][head];
        const float weight = ptx::ex2(warp_sum.x - finite_or_zero(sums.x));
        const float4 part = ptx::load_float4(static_cast<float*>(scratch.area(j)) + place(head, d));
        sums.y += warp_sum.y * weight, sums.z += warp_sum.z * weight, sums.w += warp_sum.w;
        out.x += part.x * weight, out.y += part.y * weight, out.z += part.z * weight, out.w += part.w * weight;
      }
      if constexpr (kIsFp8<T>) {
        out = {out.x * value_scale, out.y * value_scale, out.z * value_scale, out.w * value_scale};
      }
      ptx::store_float4(w.partial_out + (partial * w.tile_heads + head) * kHeadDim + d, out);
      if (d == 0) ptx::store_float4(w.partial_sums + (partial * w.tile_heads + head) * 4, sums);
    }
  }
  ptx::sync_block();  // the stages may be filled again
  state.clear();
}

// What the anchors' tiles need beside the state that all tiles go into: the matched entry's query attends to them
// as well. Where they come twice, its state is the one of all tiles the first time, and `state` is not used.
template <typename T, int kHeadDim, int kHeadBlocks>
struct Replaced {
  static constexpr bool kFits = kHeadBlocks == hit_blocks(kHeadDim, kHeadBlocks);
  WarpState<T, kHeadDim, kHeadBlocks, true> state;

  template <typename Q>
  MAC_DEVICE void load_query(const AmendParams& p, const Piece& piece, int elements, float scale,
                             Factor<T>* shared) {
    const int64_t slot = p.requests.slots[piece.request];
    const Q* rows = p.ring.rotated<Q>(slot, piece.kv_head, piece.work.place);
    state.load_query([&](int g) { return rows + g * elements; }, p.shape.group_size, elements, scale, shared);
  }
  // a of the lane's two tokens of the strip from place `first` of the list on.
  MAC_DEVICE static float2 load_weights(const AmendParams& p, const Piece& piece, int first) {
    const int64_t slot = p.requests.slots[piece.request];
    const float* list = p.ring.anchor_weights(slot, piece.kv_head, piece.work.place);
    const int place = first + ptx::lane_id() / 4;
    return {place < p.num_anchors ? list[place] : 0.f, place + 8 < p.num_anchors ? list[place + 8] : 0.f};
  }
  // See `counted`.
  MAC_DEVICE static Counted count(float2 a, float density) {
    Counted of{};
    for (int i = 0; i < 2; ++i) {
      const float weight = i ? a.y : a.x, count = 1.f + ptx::divide(weight, 1.f + weight * density);
      of.lift[i] = ptx::lg2(count), of.light[i] = ptx::divide(weight, count);
    }
    return of;
  }
  MAC_DEVICE void attend(const AmendParams& p, const int* starts, const T* stage, const Factor<T>* query,
                         int first_token, uint32_t valid, const Counted& counted) {
    float x[kHeadBlocks][4];
    warp_logits(p, state, starts, stage, query, first_token, valid, x);
    lift(x, counted);
    raise_max(state, x);
    add_light(state, x, counted);
    add_values(state, x, stage);
    state.anchors += ptx::count_bits(valid & 0xffffu);
  }
};

// Whether registers are short: what can is then kept in shared memory.
template <int kHeadDim, int kHeadBlocks>
constexpr bool kShortOfRegisters = kHeadDim * kHeadBlocks >= 256;  // sums of 64 or more registers

template <typename Q, typename T, int kHeadDim, bool kExact, int kHeadBlocks>
MAC_DEVICE void amend_piece(
    const AmendParams& p, const AmendWorkspace& w,
    std::conditional_t<kShortOfRegisters<kHeadDim, kHeadBlocks>, const Piece&, const Piece> piece) {
  using Stage = Stage<kHeadDim, T>;
  static_assert(sizeof(SampleScratch) <= kWarps * Stage::kCount * Stage::kBytes, "it fits where the stages were");
  constexpr bool kReplaces = Replaced<T, kHeadDim, kHeadBlocks>::kFits, kTwice = anchors_twice(kHeadDim);
  constexpr bool kAhead = !kShortOfRegisters<kHeadDim, kHeadBlocks>;
  __shared__ int starts[8 * kHeadBlocks], lasts[8 * kHeadBlocks];
  __shared__ typename Sampler<kHeadBlocks>::Shared sampler_shared[kWarps];
  T* shared = static_cast<T*>(dynamic_shared());
  auto* query = reinterpret_cast<Factor<T>*>(shared + kWarps * Stage::kCount * Stage::kElements);
  Factor<T>* replaced_query = query + kQueryElements<kHeadDim, kHeadBlocks>;
  const int warp = threadIdx.x / 32, elements = row_elements<kHeadDim, kExact>(p.shape);
  T* stages = shared + warp * Stage::kCount * Stage::kElements;
  Sampler<kHeadBlocks> sampler;
  WarpState<T, kHeadDim, kHeadBlocks> state;
  Replaced<T, kHeadDim, kHeadBlocks> replaced;
  state.clear();
  replaced.state.clear();

  // Read where they are needed, so that no register holds them meanwhile.
  const auto scale = [&] { return kIsFp8<T> ? p.sm_scale * p.kv.k_scale.of(piece.kv_head) : 1.f; };
  const auto value_scale = [&] { return kIsFp8<T> ? p.kv.v_scale.of(piece.kv_head) : 1.f; };

  // Round r looks up the rows of tile r, asks for tile r - 1 and computes tile r - kCount. There is one loop for
  // filling the pipeline and for using it.
  Row row{};
  typename Stage::Valid valid = 0;
  int slot = 0;
  float2 next_weights{};  // of the anchors of the next tile: nobody is to wait for them
  float density = 0.f;
#pragma unroll 1
  for (int ahead = piece.begin;; ++ahead) {
    // First of all, as behind the copies of this round it would come as late as they do.
    const Row last = row;
    if (ahead < piece.end) row = find_row<kReplaces, kTwice>(p, w, piece, ahead, warp);
    if (ahead > piece.begin && ahead <= piece.end) {
      load_stage<T, kHeadDim, kExact>(p, w, piece, last,
                                      stages + (ahead - 1 - piece.begin) % Stage::kCount * Stage::kElements);
    }
    ptx::cp_async_commit();
    valid = valid << kWarpTokens | (ptx::ballot(row.valid && ahead < piece.end) & 0xffffu);
    if (ahead == piece.begin) {
      load_bounds<kHeadBlocks>(p, w, piece, starts, lasts);
      const int first_query = piece.first_query(p, w), G = p.shape.group_size;
      const Q* rows = static_cast<const Q*>(p.query.data) + piece.request * p.query.batch_stride +
                      int64_t{piece.kv_head} * G * p.query.head_stride;
      const auto row_of = [&](int column) {
        const int i = first_query + column, token = w.group_size.divide(i);
        return rows + token * p.query.token_stride + (i - token * G) * p.query.head_stride;
      };
      state.load_query(row_of, piece.num_queries(w), elements, scale(), query);
      const TileTokens begin = tile_tokens<kReplaces, kTwice>(p, piece.work, ahead);
      if (kReplaces && kAhead && begin.anchors) {
        next_weights = replaced.load_weights(p, piece, begin.begin + warp * kWarpTokens);
      }
      if constexpr (kAhead) density = sample_density(p.num_anchors, piece.work.start);
    }
    const int tile = ahead - Stage::kCount;
    if (tile < piece.begin) continue;
    const TileTokens tokens = tile_tokens<kReplaces, kTwice>(p, piece.work, tile);
    const int first = tokens.begin + warp * kWarpTokens;
    if (tile == piece.begin) {  // while the first tiles are on their way
      sampler.begin(p, piece, sampler_shared[warp]);
      if (kReplaces && tokens.anchors) replaced.template load_query<Q>(p, piece, elements, scale(), replaced_query);
    }
    float2 weights = next_weights;
    if (kReplaces && tokens.anchors) {
      if constexpr (kAhead) next_weights = replaced.load_weights(p, piece, first + kTileTokens);
      if constexpr (!kAhead) {
        weights = replaced.load_weights(p, piece, first);
        density = sample_density(p.num_anchors, piece.work.start);
      }
    }
    ptx::cp_async_wait<Stage::kCount - 1>();
    ptx::sync_warp();  // the stage is filled for all lanes

    const T* stage = stages + slot * Stage::kElements;
    if (first < tokens.end) {
      float x[kHeadBlocks][4];
      const auto there = static_cast<uint32_t>(valid >> (kWarpTokens * Stage::kCount));
      const int first_token =
          kReplaces && tokens.anchors ? piece.work.start : first;  // where all heads attend to all of them
      const bool of_entry = kTwice && tokens.anchors && piece.span(tile) == kOld;  // the entry's query attends
      warp_logits(p, state, starts, stage, of_entry ? replaced_query : query, first_token, there, x);
      Counted counted;
      if (kReplaces && tokens.anchors) counted = replaced.count(weights, density), lift(x, counted);
      if (first + kWarpTokens > piece.work.position + 1 && !(kReplaces && tokens.anchors))
        mask_later(lasts, first, x);
      raise_max(state, x);
      const bool draws = sampler.draws && piece.span(tile) == kOld;
      float lead = 0.f, bound = 0.f;
      if (draws) {
        lead = sampler.lead(x);
        bound = ptx::lg2(uniform(sampler.shared->seed, first + sampler.token_of_lane()));
      }
      add_values(state, x, stage);
      if (draws && ptx::ballot(lead > bound)) sampler.take(p, w, piece.kv_group(p), first, lead, bound);
      if constexpr (kReplaces) {
        if (tokens.anchors) {
          add_light(state, x, counted);
          if constexpr (kTwice) {
            if (of_entry) state.anchors += ptx::count_bits(there & 0xffffu);
          } else {
            replaced.attend(p, starts, stage, replaced_query, first_token, there, counted);
          }
        }
      }
    }
    ptx::sync_warp();  // all lanes have read the stage

    const bool at_end = tile + 1 == piece.end;
    const Scratch scratch{reinterpret_cast<unsigned char*>(shared + slot * Stage::kElements),
                          Stage::kCount * Stage::kBytes};
    const int64_t partial = int64_t{piece.number} * kNumSpans;
    const int last_old = piece.work.template tiles_of_old<kTwice>() - 1;
    if (tile == last_old || (at_end && tile < last_old)) {
      if (sampler.draws) sampler.hand_over(p, w, piece.kv_group(p));
      if constexpr (kReplaces && !kTwice) {
        if (tokens.anchors) write_partial<kExact>(w, replaced.state, scratch, partial + kOld, value_scale());
      }
      if (!kReplaces || kTwice || !tokens.anchors) {
        write_partial<kExact>(w, state, scratch, partial + kOld, value_scale());
      }
    }
    if (at_end) {
      if (piece.span(tile) == kFresh) write_partial<kExact>(w, state, scratch, partial + kFresh, value_scale());
      break;
    }
    slot = slot + 1 == Stage::kCount ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
}

// Asks for the queries and the bands, which are read whatever match answers, while match is still looking. The
// lengths and pages that this goes by may still be written by the launches before: a wrong one is a prefetch in
// vain, within the caches all the same.
template <typename Q, typename T, int kHeadDim, bool kExact>
MAC_DEVICE void prefetch_bands(const AmendParams& p, const AmendWorkspace& w) {
  constexpr int kQueryLine = 64, kLine = 128 / sizeof(T);  // elements
  constexpr int kMostBytes = 20 << 20;                     // of the L2 cache's 50 MB
  const int elements = row_elements<kHeadDim, kExact>(p.shape), values = value_elements<kHeadDim, kExact>(p.shape);
  const int query_lines = (elements + kQueryLine - 1) / kQueryLine;
  const int k_lines = (elements + kLine - 1) / kLine, v_lines = (values + kLine - 1) / kLine;
  const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  const int B = p.shape.batch, H = p.shape.num_kv_heads, Hq = p.shape.num_qo_heads();
#pragma unroll 1
  for (int row = thread; row < B * Hq; row += threads) {
    const Q* query =
        static_cast<const Q*>(p.query.data) + row / Hq * p.query.batch_stride + row % Hq * p.query.head_stride;
    for (int i = 0; i < query_lines; ++i) ptx::prefetch_l2(query + i * kQueryLine);
  }
  const int64_t rows = int64_t{B} * p.band * H;
  if (rows * (elements + values) * static_cast<int>(sizeof(T)) > kMostBytes) return;
#pragma unroll 1
  for (int row = thread; row < rows; row += threads) {
    const int kv_head = row % H, request = row / H / p.band, n = p.requests.seq_lens[request];
    if (n <= 0 || n > w.max_tokens) continue;
    const int token = n - 1 - row / H % p.band;
    if (token < 0) continue;
    const int index = w.page_size.divide(token), offset = token - index * p.kv.page_size;
    const int64_t page = p.kv.block_table[request * p.kv.block_table_stride + index];
    if (page < 0 || page >= p.kv.num_pages) continue;
    const T* k = static_cast<const T*>(p.kv.k) + page * p.kv.k_page_stride + offset * p.kv.k_token_stride;
    const T* v = static_cast<const T*>(p.kv.v) + page * p.kv.v_page_stride + offset * p.kv.v_token_stride;
    for (int i = 0; i < k_lines; ++i) {
      ptx::prefetch_l2(k + kv_head * p.kv.k_head_stride + i * kLine);
      if (kExact || i < v_lines) ptx::prefetch_l2(v + kv_head * p.kv.v_head_stride + i * kLine);
    }
  }
}

// CTAs of a processor. Where a third one fits, it makes a step at batch 1 slower (bench/README.md).
constexpr int ctas_per_processor(int head_dim) {
  return head_dim <= 128 ? 2 : 1;
}

template <typename Q, int kHeadDim, int kHeadBlocks, typename T = Q, bool kExact = true>
__global__ void __launch_bounds__(kThreads, ctas_per_processor(kHeadDim))
    amend_kernel(const __grid_constant__ AmendParams p, const __grid_constant__ AmendWorkspace w) {
  if (p.matched.source) prefetch_bands<Q, T, kHeadDim, kExact>(p, w);
  ptx::grid_dependency_wait();  // match's answer
  constexpr bool kShort = kShortOfRegisters<kHeadDim, kHeadBlocks>, kTwice = anchors_twice(kHeadDim);
  __shared__ Share shares[kShort ? kThreads : 1];
  const Share own = share_out<kTwice>(p, w);
  if (kShort) shares[threadIdx.x] = own;
  const Share& share = kShort ? shares[threadIdx.x] : own;
  ptx::grid_dependency_launch();
  __shared__ int next;
  __shared__ Piece piece;
  const int ctas = gridDim.x;
  int number = blockIdx.x;
#pragma unroll 1
  while (number < share.all_pieces) {
    find_piece<kTwice>(p, w, share, number, piece);
    int drawn = 0;
    if (threadIdx.x == 0 && share.all_pieces > ctas) {
      drawn = ptx::atomic_add(w.drawn, 1);
      if (kShort) next = drawn;
    }
    amend_piece<Q, T, kHeadDim, kExact, kHeadBlocks>(p, w, piece);
    // Read once more, so that no register holds it meanwhile.
    leave_unit<kHeadDim, kExact>(p, w, Piece(piece), dynamic_shared());
    if (share.all_pieces <= ctas) break;
    if (threadIdx.x == 0) {
      if (kShort) drawn = next;
      next = ctas + drawn;
      // There are as many draws as pieces, one after each; the last one of all leaves the counter as it was.
      if (drawn == share.all_pieces - 1) *w.drawn = 0;
    }
    ptx::sync_block();
    number = next;
  }
}

}  // namespace mac_attn::cuda
