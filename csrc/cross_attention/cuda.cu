// SPDX-License-Identifier: Apache-2.0
// cross_attention and its gradients on Hopper, with all keys of a sample on chip.
//
// Grid      one block per sample, head and chunk of queries; heads (of the gradients after chunks) fastest, because they share
//           cache lines. Of the forward it has one warpgroup, and two to four are on a multiprocessor. Of the gradients it has
//           one if its registers can hold dV and dK (two such blocks per multiprocessor), else two; a warpgroup has tiles of 64
//           queries. Scores and softmax are (re)computed in registers with queries as rows, so a row sum needs only shuffles of
//           four lanes; the output and dQ take P and dS from registers. P and dS go through shared memory into dV and dK, which
//           stay in registers until the chunk ends; with two warpgroups the first accumulates dV, the second dK, each over all
//           queries. Scores of the next tile are products while the sums of the current one are, if there is space for three
//           tiles. Up to eight chunks (1, 2, 4 or 8) are a cluster, whose blocks add up their sums; else these go to memory,
//           and a second kernel with one thread per four elements adds them
// Traffic   q and grad_out read, the output and grad_q written, once each, 16 bytes at a time; K and V once per chunk;
//           gradients of K and V: one fp32 partial sum per chunk, written and read once, unless a cluster adds them. The tile
//           after the next is fetched during products, or the next one into the cache if there is no space
// Precision scores, softmax and sums in fp32; P and dS rounded to the dtype for the products
// Limits    sm_90a; bf16 and fp16; head dims and keys of ``KEYS`` in cuda.py; heads start at multiples of 16 bytes; 64-bit
//           offsets; chunks depend only on the shape, and chunks and samples are added in order: the same bits in every run
#include "cluster.cuh"
#include "cross_attention/tiles.cuh"

namespace fd {
namespace {

// Sizes in bytes and elements. Shared memory is a pair of tiles of Q and dO for each stage, P, dS, K, V, the keys' bias: a
// product that takes 64 rows where a matrix has fewer reads on in what is not written meanwhile.
template <int D, int KEYS, bool swizzled> struct Sizes {
  static constexpr int depth = up(D, 16), keys = up(KEYS, 16);                   // as sums of products take them
  static constexpr bool by_dims = up(D, 64) * KEYS <= up(KEYS, 64) * D;          // dims are rows of dV and dK, else keys
  static constexpr int rows = by_dims ? D : KEYS, columns = by_dims ? KEYS : D;  // of dV and dK in registers
  static constexpr int pieces = up(rows, 64) / 64;
  // Warpgroups of a block: one if its registers can hold both dV and dK, else two with one of them each.
  static constexpr int groups = pieces * columns <= 80 ? 1 : 2, queries = 64 * groups, threads = 128 * groups;
  using Tile = Matrix<queries, swizzled>;
  using Bank = Matrix<keys, swizzled>;
  static constexpr int weights = Tile::bytes(KEYS), tile = Tile::bytes(depth), bank = Bank::bytes(depth);
  static constexpr int fixed = 2 * weights + 2 * bank + 4 * KEYS, least = 3 - groups;  // blocks of a multiprocessor
  static constexpr int stages = least * (fixed + 6 * tile + 1024) <= most + 1024 ? 3 : 1;
  static constexpr int stage = 2 * tile + (by_dims ? weights : 0), p_at = (by_dims ? 1 : stages) * 2 * tile;
  static constexpr int ds_at = p_at + (by_dims && stages == 3 ? stage : weights), k_at = stages * 2 * tile + 2 * weights;
  static constexpr int v_at = k_at + bank, bias_at = v_at + bank, out_at = bias_at + 4 * KEYS;
  static constexpr int out_columns = D > 128 ? D / 2 : D;  // of dQ at once
  static constexpr bool by_shuffles = groups == 2;         // the work is during products, and shared memory is short
  static constexpr int shared = out_at + (by_shuffles ? 0 : 4 * groups * Out<out_columns>::bytes);
  static constexpr int past = Tile::bytes(by_dims ? up(D, 64) : up(KEYS, 64)) - (by_dims ? tile : weights);
  static constexpr int sum = 4 * D + 16;  // of a row of dV or dK on its way out
  static_assert(least * (shared + 1024) <= most + 1024 && past <= weights && past <= bank && 2 * KEYS * sum <= k_at, "");
};

template <int D, int KEYS, bool swizzled, typename T>
__global__ void __launch_bounds__(Sizes<D, KEYS, swizzled>::threads, Sizes<D, KEYS, swizzled>::least)
    attention_gradients(CrossAttentionBackward a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = Sizes<D, KEYS, swizzled>;
  using Tile = typename S::Tile;
  FD_DYNAMIC_SHARED(Shared, all);
  unsigned char* const memory = all->bytes;
  constexpr int queries = S::queries, warps = S::threads / 32, sets = 2 / S::groups;
  constexpr bool ahead = S::stages == 3;  // scores of the next tile are computed during the sums of the current one
  const Tile p{memory + S::p_at}, ds{memory + S::ds_at};
  const typename S::Bank k{memory + S::k_at}, v{memory + S::v_at};
  float* const bias = reinterpret_cast<float*>(memory + S::bias_at);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = S::groups == 1 ? 0 : warp / 4;
  const int64_t chunk = blockIdx.x % a.chunks, h = blockIdx.x / a.chunks % a.H, b = blockIdx.x / a.chunks / a.H;
  const int64_t row = row_of(a, b), first = chunk * a.span, end = smaller(first + a.span, a.N);
  const float scale = row < 0 ? as_float(0x7FC00000u) : a.scale * log2_e;
  unsigned char* to = static_cast<unsigned char*>(a.grad_q.at) +
                      2 * (b * a.grad_q.batch + h * a.grad_q.head + (first + 16 * warp) * a.grad_q.token);

  using Tiles = Loader<D, warps, queries, swizzled>;
  Tiles q_tiles(head_of(a.q, b, h) + 2 * first * a.q.token, a.q.token, end - first);
  Tiles g_tiles(head_of(a.grad_out, b, h) + 2 * first * a.grad_out.token, a.grad_out.token, end - first);
  const int tiles = int(ceil_div(end - first, queries));
  const auto tile = [&](int stage, int which) { return Tile{memory + stage * S::stage + which * S::tile}; };
  const auto load_tile = [&](int stage, int number) {
    if (number < tiles) q_tiles.load(tile(stage, 0).at), g_tiles.load(tile(stage, 1).at);
    hopper::commit_copies();
  };
  const auto after = [](int stage) { return stage + 1 < S::stages ? stage + 1 : 0; };
  const int64_t bank = row < 0 ? 0 : row;
  Loader<D, warps, S::keys, swizzled>(head_of(a.k, bank, h), a.k.token, a.L).load(k.at);
  Loader<D, warps, S::keys, swizzled>(head_of(a.v, bank, h), a.v.token, a.L).load(v.at);
  load_tile(0, 0);
  if (ahead) load_tile(1, 1);
  constexpr int cleared = swizzled ? up(D, 64) : S::depth;
  clear<D, cleared>(k), clear<D, cleared>(v), clear_between<S::depth>(k);
  for (int stage = 0; stage < S::stages; ++stage) clear<D, cleared>(tile(stage, 0)), clear<D, cleared>(tile(stage, 1));
  for (int key = threadIdx.x; key < KEYS; key += S::threads) bias[key] = key_bias(a, b, key);

  float sums[sets][S::pieces]
            [S::columns / 2];  // dV and dK / scale; with two warpgroups the first has dV, the second dK / scale
  FD_UNROLL
  for (int set = 0; set < sets; ++set) FD_UNROLL
  for (int piece = 0; piece < S::pieces; ++piece) FD_UNROLL
  for (int i = 0; i < S::columns / 2; ++i) sums[set][piece][i] = 0.0f;

  float s[KEYS / 2], changes[KEYS / 2];  // S and dP
  const auto multiply_scores = [&](float (&to)[KEYS / 2], Tile of_queries, typename S::Bank of_keys) {
    hopper::begin_products();
    const hopper::Operand left = of_queries.over_columns(64 * group), right = of_keys.over_columns(0);
    FD_UNROLL
    for (int i = 0; i < S::depth / 16; ++i)
      hopper::multiply<KEYS, T, false, false>(to, left.after(Tile::after_columns(i)), right.after(S::Bank::after_columns(i)),
                                              i > 0);
    hopper::commit_products();
  };
  uint32_t parts[S::keys / 16][4] = {};  // dS as the operand of products: 16 keys each
  // Computes P and dS of the warp's queries.
  const auto weigh = [&] {
    float weights[KEYS / 2], share[2], delta[2] = {};
    uint32_t words[KEYS / 4];
    hopper::wait_products<1>();
    hopper::settle(s);
    float top[2];
    scale_scores(s, bias, scale, weights, top);
    hopper::wait_products<0>();
    hopper::settle(changes);
    softmax(weights, top, share, delta, [&](int i) { return changes[i]; });
    FD_UNROLL
    for (int i = 0; i < KEYS / 2; ++i) weights[i] *= share[i / 2 % 2];
    FD_UNROLL
    for (int i = 0; i < KEYS / 4; ++i) words[i] = pair_of<T>(weights[2 * i], weights[2 * i + 1]);
    store(p, 16 * warp, words);
    FD_UNROLL
    for (int i = 0; i < KEYS / 2; ++i) weights[i] *= changes[i] - delta[i / 2 % 2];
    FD_UNROLL
    for (int i = 0; i < KEYS / 4; ++i) parts[i / 4][i % 4] = words[i] = pair_of<T>(weights[2 * i], weights[2 * i + 1]);
    store(ds, 16 * warp, words);
  };
  float dq[S::out_columns / 2];
  const auto multiply_dq = [&](int column) {
    hopper::begin_products();
    const hopper::Operand keys = k.over_rows(column);
    FD_UNROLL
    for (int i = 0; i < S::keys / 16; ++i)
      hopper::multiply<S::out_columns, T, true>(dq, parts[i], keys.after(S::Bank::after_rows(i)), i > 0);
    hopper::commit_products();
  };
  const auto multiply_sums = [&](int stage) {
    hopper::begin_products();
    FD_UNROLL
    for (int set = 0; set < sets; ++set) {
      const bool of_k = set + group;
      const Tile of_keys = of_k ? ds : p, tokens = tile(stage, 1 - of_k);
      const hopper::Operand left = (S::by_dims ? tokens : of_keys).over_rows(0);
      const hopper::Operand right = (S::by_dims ? of_keys : tokens).over_rows(0);
      FD_UNROLL
      for (int piece = 0; piece < S::pieces; ++piece) FD_UNROLL
      for (int i = 0; i < queries / 16; ++i)
        hopper::multiply<S::columns, T, true, true>(sums[set][piece], left.after(piece * Tile::next_64 + Tile::after_rows(i)),
                                                    right.after(Tile::after_rows(i)), true, S::rows - 64 * piece);
    }
    hopper::commit_products();
  };
  int left = int(end - first) - 16 * warp;  // of the warp's queries
  const auto put_dq = [&](int column) {
    hopper::settle(dq);
    put<T, S::out_columns, S::by_shuffles>(
        to + 2 * column, 2 * a.grad_q.token, left, dq, [&](int) { return a.scale; },
        memory + S::out_at + warp * Out<S::out_columns>::bytes);
  };

  int stage = 0;
  if constexpr (ahead) {
    hopper::wait_copies<1>();
    hopper::publish_to_products();
    __syncthreads();  // K, V and the first tile are there
    multiply_scores(s, tile(0, 0), k);
    hopper::wait_products<0>();
  }
  for (int number = 0; number < tiles; ++number) {
    if constexpr (!ahead) {
      hopper::wait_copies<0>();
      hopper::publish_to_products();
      __syncthreads();  // the tile is there
      multiply_scores(s, tile(0, 0), k);
    }
    multiply_scores(changes, tile(stage, 1), v);
    if (!ahead)
      if (int(threadIdx.x / 2) < int(end - first) - (number + 1) * queries)
        for (int line = threadIdx.x % 2 * 128; line < 2 * D; line += 256) {  // of the cache
          const int64_t query = first + (number + 1) * queries + threadIdx.x / 2;
          hopper::prefetch(head_of(a.q, b, h) + 2 * query * a.q.token + line);
          hopper::prefetch(head_of(a.grad_out, b, h) + 2 * query * a.grad_out.token + line);
        }
    weigh();
    hopper::publish_to_products();
    multiply_dq(0);
    if constexpr (ahead) {
      hopper::wait_copies<0>();
      hopper::publish_to_products();
    }
    __syncthreads();  // P and dS of all queries, and the next tile if scores are computed ahead
    multiply_sums(stage);
    const int following = number + 1 < tiles ? after(stage) : stage;  // after the last tile it is multiplied again, for nothing
    if constexpr (ahead) {
      multiply_scores(s, tile(following, 0), k);
      load_tile(after(after(stage)), number + 2);
    }
    hopper::wait_products<ahead ? 2 : 1>();
    put_dq(0);
    if constexpr (S::out_columns < D) {
      multiply_dq(S::out_columns);
      hopper::wait_products<0>();
      put_dq(S::out_columns);
    }
    hopper::wait_products<0>();
    __syncthreads();  // all are done with the tile, P and dS
    if (!ahead) load_tile(0, number + 1);
    stage = following;
    to += 2 * queries * a.grad_q.token, left -= queries;
  }
  hopper::wait_copies<0>();
  hopper::wait_products<0>();
  FD_UNROLL
  for (int set = 0; set < sets; ++set) FD_UNROLL
  for (int piece = 0; piece < S::pieces; ++piece) hopper::settle(sums[set][piece]);

  // Sums through shared memory, dV before dK, keys as rows, to rows of memory.
  FD_UNROLL
  for (int set = 0; set < sets; ++set) {
    const bool of_k = set + group;
    const float factor = of_k ? a.scale : 1.0f;
    FD_UNROLL
    for (int piece = 0; piece < S::pieces; ++piece) FD_UNROLL
    for (int i = 0; i < S::columns / 2; ++i) {
      const int of_row = 64 * piece + 16 * (warp % 4) + lane / 4 + 8 * (i / 2 % 2);
      const int of_column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      const int dim = S::by_dims ? of_row : of_column, key = S::by_dims ? of_column : of_row;
      if (of_row < S::rows) reinterpret_cast<float*>(memory + (of_k * KEYS + key) * S::sum)[dim] = sums[set][piece][i] * factor;
    }
  }
  const int blocks = a.chunks > 1 && !a.partials ? int(a.chunks) : 1;  // of a cluster, which adds up its chunks
  if (blocks > 1) cluster_arrive(), cluster_wait();
  else __syncthreads();
  constexpr int fours = D / 4;
  const int share = blocks > 1 ? int(chunk) : 0;
  for (int i = share * S::threads + threadIdx.x; i < 2 * int(a.L) * fours; i += blocks * S::threads) {
    const int line = i / fours, four = i % fours, of_k = line >= a.L, key = line - of_k * int(a.L);
    const float4* const own = reinterpret_cast<const float4*>(memory + (of_k * KEYS + key) * S::sum + 16 * four);
    float4 x;
    if (blocks == 1) {
      x = *own;
    } else {
      x = *of_block(own, 0);
      for (int other = 1; other < blocks; ++other) {
        const float4 y = *of_block(own, other);
        x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
      }
    }
    if (a.partials)
      *reinterpret_cast<float4*>(a.partials + slot_of(a, b * a.chunks + chunk, key, h, 4 * four) +
                                 (of_k ? 0 : a.B * a.chunks * a.L * a.H * a.D)) = x;
    else
      *reinterpret_cast<uint2*>(static_cast<T*>(of_k ? a.grad_k : a.grad_v) + slot_of(a, b, key, h, 4 * four)) =
          uint2{pair_of<T>(x.x, x.y), pair_of<T>(x.z, x.w)};
  }
  if (blocks > 1) cluster_arrive(), cluster_wait();  // others may read this block's memory until here
#else
  asm("trap;");
#endif
}

// Sizes of the forward, of which shared memory is K, V, tiles of Q, the keys' bias, output on its way out.
template <int D, int KEYS, bool swizzled> struct ForwardSizes {
  static constexpr int depth = up(D, 16), keys = up(KEYS, 16), queries = 64, threads = 128;
  using Tile = Matrix<queries, swizzled>;
  using Bank = Matrix<keys, swizzled>;
  static constexpr int tile = Tile::bytes(depth), bank = Bank::bytes(depth);
  static constexpr int out_columns = D > 128 ? D / 2 : D;  // at once
  static constexpr int rest = 2 * bank + 4 * KEYS + 4 * Out<out_columns>::bytes;
  // Blocks of a multiprocessor, as many as its registers allow, and tiles in shared memory.
  static constexpr int least = D > 80 ? 2 : KEYS > 80 || D > 64 ? 3 : 4;
  static constexpr int stages = least * (rest + 3 * tile + 1024) <= most + 1024 ? 3 : 2;
  static constexpr int v_at = bank, tiles_at = 2 * bank, bias_at = tiles_at + stages * tile, out_at = bias_at + 4 * KEYS;
  static constexpr int shared = out_at + 4 * Out<out_columns>::bytes;
  static_assert(least * (shared + 1024) <= most + 1024, "");
};

template <int D, int KEYS, bool swizzled, typename T>
__global__ void __launch_bounds__(ForwardSizes<D, KEYS, swizzled>::threads, ForwardSizes<D, KEYS, swizzled>::least)
    attention(CrossAttention a) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = ForwardSizes<D, KEYS, swizzled>;
  using Tile = typename S::Tile;
  using Bank = typename S::Bank;
  FD_DYNAMIC_SHARED(Shared, all);
  unsigned char* const memory = all->bytes;
  constexpr int queries = S::queries, warps = S::threads / 32;
  const Bank k{memory}, v{memory + S::v_at};
  float* const bias = reinterpret_cast<float*>(memory + S::bias_at);
  const int warp = threadIdx.x / 32;
  const int64_t h = blockIdx.x % a.H, chunk = blockIdx.x / a.H % a.chunks, b = blockIdx.x / a.H / a.chunks;
  const int64_t row = row_of(a, b), first = chunk * a.span, end = smaller(first + a.span, a.N);
  const float scale = row < 0 ? as_float(0x7FC00000u) : a.scale * log2_e;
  unsigned char* to =
      static_cast<unsigned char*>(a.out.at) + 2 * (b * a.out.batch + h * a.out.head + (first + 16 * warp) * a.out.token);

  Loader<D, warps, queries, swizzled> q_tiles(head_of(a.q, b, h) + 2 * first * a.q.token, a.q.token, end - first);
  const int tiles = int(ceil_div(end - first, queries));
  const auto tile = [&](int stage) { return Tile{memory + S::tiles_at + stage * S::tile}; };
  const auto load_tile = [&](int stage, int number) {
    if (number < tiles) q_tiles.load(tile(stage).at);
    hopper::commit_copies();
  };
  const int64_t bank = row < 0 ? 0 : row;
  Loader<D, warps, S::keys, swizzled>(head_of(a.k, bank, h), a.k.token, a.L).load(k.at);
  Loader<D, warps, S::keys, swizzled>(head_of(a.v, bank, h), a.v.token, a.L).load(v.at);
  FD_UNROLL
  for (int stage = 0; stage + 1 < S::stages; ++stage) load_tile(stage, stage);
  clear<D, S::depth>(k), clear<D, S::depth>(v);
  FD_UNROLL
  for (int stage = 0; stage < S::stages; ++stage) clear<D, S::depth>(tile(stage));
  for (int key = threadIdx.x; key < KEYS; key += S::threads) bias[key] = key_bias(a, b, key);

  int stage = 0, left = int(end - first) - 16 * warp;  // of the warp's queries
  for (int number = 0; number < tiles; ++number) {
    hopper::wait_copies<S::stages - 2>();
    hopper::publish_to_products();
    __syncthreads();  // the tile is there, and the one before it is done with
    float s[KEYS / 2];
    hopper::begin_products();
    const hopper::Operand left_of_s = tile(stage).over_columns(0), right_of_s = k.over_columns(0);
    FD_UNROLL
    for (int i = 0; i < S::depth / 16; ++i)
      hopper::multiply<KEYS, T, false, false>(s, left_of_s.after(Tile::after_columns(i)),
                                              right_of_s.after(Bank::after_columns(i)), i > 0);
    hopper::commit_products();
    const int before = stage > 0 ? stage - 1 : S::stages - 1;
    load_tile(before, number + S::stages - 1);
    hopper::wait_products<0>();
    hopper::settle(s);
    float weights[KEYS / 2], top[2], share[2], nothing[2] = {};
    scale_scores(s, bias, scale, weights, top);
    softmax(weights, top, share, nothing, [](int) { return 0.0f; });
    uint32_t parts[S::keys / 16][4] = {};  // as products want them, keys to 16 at a time
    FD_UNROLL
    for (int i = 0; i < KEYS / 4; ++i) parts[i / 4][i % 4] = pair_of<T>(weights[2 * i], weights[2 * i + 1]);
    FD_UNROLL
    for (int column = 0; column < D; column += S::out_columns) {
      float x[S::out_columns / 2];
      hopper::begin_products();
      const hopper::Operand values = v.over_rows(column);
      FD_UNROLL
      for (int i = 0; i < S::keys / 16; ++i)
        hopper::multiply<S::out_columns, T, true>(x, parts[i], values.after(Bank::after_rows(i)), i > 0);
      hopper::commit_products();
      hopper::wait_products<0>();
      hopper::settle(x);
      put<T, S::out_columns, false>(
          to + 2 * column, 2 * a.out.token, left, x, [&](int r) { return share[r]; },
          memory + S::out_at + warp * Out<S::out_columns>::bytes);
    }
    stage = stage + 1 < S::stages ? stage + 1 : 0;
    to += 2 * queries * a.out.token, left -= queries;
  }
  hopper::wait_copies<0>();
#else
  asm("trap;");
#endif
}

// Adds the partial sums: four elements per thread of the gradient of K (blockIdx.y = 0) or V (blockIdx.y = 1).
template <typename T> __global__ void __launch_bounds__(threads_per_block) add_chunks(CrossAttentionBackward a) {
  const int64_t size = a.L * a.H * a.D, blocks = ceil_div(size, 4 * threads_per_block);
  const int64_t row = blockIdx.x / blocks, at = (blockIdx.x % blocks * threads_per_block + threadIdx.x) * 4;
  if (at >= size) return;
  const float* const partials = a.partials + (blockIdx.y ? a.B * a.chunks * size : 0);
  float total[4];
  sum_of_chunks(a, partials, row, at, total);
  T* const to = static_cast<T*>(blockIdx.y ? a.grad_v : a.grad_k) + row * size + at;
  *reinterpret_cast<uint2*>(to) = uint2{pair_of<T>(total[0], total[1]), pair_of<T>(total[2], total[3])};
}

template <int D, int KEYS, bool swizzled, typename T> const char* launch(const CrossAttentionBackward& a, const Queue& queue) {
  using S = Sizes<D, KEYS, swizzled>;
  if (const char* error = fd_error(cudaFuncSetAttribute(attention_gradients<D, KEYS, swizzled, T>,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared)))
    return error;
  const unsigned blocks = unsigned(a.B * a.H * a.chunks);
  if (a.chunks > 1 && !a.partials)
    FD_LAUNCH_CLUSTER((attention_gradients<D, KEYS, swizzled, T>), unsigned(a.chunks), blocks, S::threads, S::shared,
                      queue.stream, a);
  else FD_LAUNCH((attention_gradients<D, KEYS, swizzled, T>), blocks, S::threads, S::shared, queue.stream, a);
  if (a.partials) {
    const int64_t blocks = a.R * ceil_div(a.L * a.H * a.D, 4 * threads_per_block);
    FD_LAUNCH(add_chunks<T>, dim3(unsigned(blocks), 2), threads_per_block, 0, queue.stream, a);
  }
  return fd_launch_error();
}

template <int D, int KEYS, bool swizzled, typename T> const char* launch(const CrossAttention& a, const Queue& queue) {
  using S = ForwardSizes<D, KEYS, swizzled>;
  if (const char* error = fd_error(
          cudaFuncSetAttribute(attention<D, KEYS, swizzled, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::shared)))
    return error;
  FD_LAUNCH((attention<D, KEYS, swizzled, T>), unsigned(a.B * a.H * a.chunks), S::threads, S::shared, queue.stream, a);
  return fd_launch_error();
}

template <typename T, typename A> const char* launch(const A& a, const Queue& queue) {
  if (a.L <= 80) {
    if (a.D == 40) return a.swizzled ? launch<40, 80, true, T>(a, queue) : launch<40, 80, false, T>(a, queue);
    if (a.D == 64) return a.swizzled ? launch<64, 80, true, T>(a, queue) : launch<64, 80, false, T>(a, queue);
    if (a.D == 80) return launch<80, 80, false, T>(a, queue);
    if (a.D == 160) return launch<160, 80, false, T>(a, queue);
  }
  if (a.L <= 120 && a.D == 72) return launch<72, 120, false, T>(a, queue);
  return "no kernel for these head dims and keys";
}

}  // namespace
}  // namespace fd

const char* cross_attention_cuda(const fd::CrossAttention& a, const fd::Queue& queue) {
  return a.dtype == fd::Dtype::bf16 ? fd::launch<fd::bf16>(a, queue) : fd::launch<fd::f16>(a, queue);
}

const char* cross_attention_backward_cuda(const fd::CrossAttentionBackward& a, const fd::Queue& queue) {
  return a.dtype == fd::Dtype::bf16 ? fd::launch<fd::bf16>(a, queue) : fd::launch<fd::f16>(a, queue);
}

// Whether this build contains the code for Hopper; on other GPUs the kernels trap.
bool cross_attention_cuda_built() {
#ifdef __CUDACC__
  for (int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
  return false;
#else
  return true;
#endif
}
