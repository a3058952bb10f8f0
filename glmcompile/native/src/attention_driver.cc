#include "attention_driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>

#include "scratch_buffer.h"

namespace glmcompile {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Query rows of a task: many, to read a tile of keys once for all of them, unless that leaves too
// few tasks to balance threads.
constexpr int kTaskRows = 6 * kRowBlock, kSmallTaskRows = 3 * kRowBlock;
constexpr int kTasksPerThread = 8;
// Below this many multiply-adds a call is over before other threads would have woken up.
constexpr double kSerialWork = 4e5;
constexpr size_t kSerialFold = 1 << 15;  // floats to fold for which the same holds
constexpr size_t kSharedBytes = 64 << 20;  // at most, of the tiles that tasks share

alignas(64) constexpr char kZeroRow[kMaxHeadSize * sizeof(float)] = {};
constexpr const void* kZeros = kZeroRow;  // a key or value of any type

// Positions [begin, end) of keys in their segment.
struct Keys {
  int64_t begin, end;
};

// Queries [first, first + count) of one segment, for the heads that share one key/value head.
struct Task {
  const Segment* segment;
  int kv_head;
  int64_t first;
  int count;
  int64_t last_key;               // past-the-last key that any of its queries sees
  int64_t first_tile, last_tile;  // [first_tile, last_tile)
  int64_t shared;                 // its first tile among the shared ones, or -1
  size_t partial = 0;             // of its first tile, when tiles are computed apart
};

// A run of tiles of `heads` tasks, which differ in kv_head only.
struct Unit {
  const Task* tasks;  // consecutive
  int heads;
  int64_t first_tile, last_tile;
};

// Hands out aligned pieces of one buffer.
class Arena {
 public:
  explicit Arena(char* base) : next_(reinterpret_cast<uintptr_t>(base)), base_(next_) {}
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return next_ - base_; }

 private:
  uintptr_t next_, base_;
};

// Keys and values of one tile, and which of them are there.
struct Tile {
  Tile() = default;
  Tile(Arena* arena, HeadSizes head, int packed_size)
      : packed{arena->take<char>(bytes(head.key, packed_size)),
               arena->take<char>(bytes(head.value, packed_size)), arena->take<int32_t>(kKeyTile)},
        bias(arena->take<float>(kKeyTile)) {}
  static size_t bytes(int head_size, int packed_size) {
    return static_cast<size_t>(kKeyTile) * padded_head(head_size) * packed_size;
  }
  PackedTile packed;
  float* bias;            // [kKeyTile] -inf hides a key of an unmapped page
  bool unmapped = false;  // whether there is one; bias is set only then
};

// A tile packed once for all tasks of its segment.
struct SharedTile {
  const Segment* segment;
  int kv_head;
  int64_t index;
  int count;  // of keys
  Tile tile;
};

// The buffers one thread needs for a task of `rows` rows.
struct Workspace {
  Workspace(Arena arena, int rows, HeadSizes head, int packed_size) {
    const size_t key_width = padded_head(head.key), value_width = padded_head(head.value);
    queries = {arena.take<float>(rows * key_width), arena.take<float>(rows)};
    tile = Tile(&arena, head, packed_size);
    scores = arena.take<float>(kRowBlock * kKeyTile);
    part = {arena.take<float>(kRowBlock), arena.take<float>(kRowBlock),
            arena.take<float>(kRowBlock * value_width)};
    state = {arena.take<float>(rows), arena.take<float>(rows),
             arena.take<float>(rows * value_width)};
    bytes = arena.used();
  }
  PackedQueries queries;
  Tile tile;
  float* scores;
  SoftmaxState part, state;
  size_t bytes;
};

class Run {
 public:
  Run(const KernelContext& context, const AttentionKernels& kernels,
      const AttentionProblem& problem)
      : context_(context),
        kernels_(kernels),
        p_(problem),
        group_(problem.num_heads / problem.kv_num_heads),
        key_width_(padded_head(problem.head.key)),
        value_width_(padded_head(problem.head.value)),
        element_size_(problem.element == Element::kFloat ? 4 : 1) {}

  void execute() {
    make_tasks();
    if (tasks_.empty()) return;
    if (work_ < kSerialWork) {
      for (SharedTile& shared : shared_) pack_shared(&shared);
      for (const Task& task : tasks_) run_task(task);
      return;
    }
    context_.parallel_for(shared_.size(), [&](size_t i) { pack_shared(&shared_[i]); });
    if (!split()) {
      context_.parallel_for(tasks_.size(), [&](size_t i) { run_task(tasks_[i]); });
    } else {
      context_.parallel_for(units_.size(), [&](size_t i) { run_unit(units_[i]); });
      if (partial_count_ < kSerialFold)
        for (const Task& task : tasks_) fold_task(task);
      else
        context_.parallel_for(tasks_.size(), [&](size_t i) { fold_task(tasks_[i]); });
    }
  }

 private:
  // Visits the tiles of a unit, all heads of one before the next, and knows one step ahead where
  // keys and values are: kernels prefetch those while they work.
  class Walk {
   public:
    Walk(const Run& run, const Unit& unit)
        : run_(run), unit_(unit), steps_((unit.last_tile - unit.first_tile) * unit.heads) {
      find(0);
      find(1);
    }
    explicit operator bool() const { return step_ < steps_; }
    void next() { find(++step_ + 1); }

    int head() const { return static_cast<int>(step_ % unit_.heads); }
    int64_t tile() const { return tile_of(step_); }
    const Task& task() const { return unit_.tasks[head()]; }
    // Not of tasks with shared tiles.
    const TileRows& rows() const { return rows_[step_ % 2]; }
    const TileRows& ahead() const { return rows_[(step_ + 1) % 2]; }  // padded = 0: none

   private:
    int64_t tile_of(int64_t step) const { return unit_.first_tile + step / unit_.heads; }

    void find(int64_t step) {
      const Task& task = unit_.tasks[step % unit_.heads];
      TileRows* rows = &rows_[step % 2];
      rows->padded = 0;
      if (task.shared < 0 && step < steps_)
        run_.find_rows(*task.segment, task.kv_head, tile_of(step) * kKeyTile,
                       keys_of(task.last_key, tile_of(step)), rows);
    }

    const Run& run_;
    const Unit unit_;
    const int64_t steps_;
    int64_t step_ = 0;
    TileRows rows_[2];
  };

  void make_tasks() {
    int64_t rows = 0;
    for (const Segment& segment : p_.segments) rows += segment.queries * p_.num_heads;
    const bool many = rows / kTaskRows >= static_cast<int64_t>(kTasksPerThread * threads_);
    const int step = std::max(1, (many ? kTaskRows : kSmallTaskRows) / group_);
    for (const Segment& segment : p_.segments) {
      const Keys all = keys_of_queries(segment, 0, segment.queries);
      const int64_t first_tile = all.begin / kKeyTile, tiles = tiles_of(all.end) - first_tile;
      const int64_t shared = segment.queries > step ? share_tiles(segment, all) : -1;
      for (int64_t first = 0; first < segment.queries; first += step) {
        const int count = static_cast<int>(std::min<int64_t>(step, segment.queries - first));
        const Keys keys = keys_of_queries(segment, first, count);
        Task task{&segment, 0, first, count, keys.end, keys.begin / kKeyTile, tiles_of(keys.end),
                  -1};
        for (task.kv_head = 0; task.kv_head < p_.kv_num_heads; ++task.kv_head) {
          if (shared >= 0)
            task.shared = shared + task.kv_head * tiles + task.first_tile - first_tile;
          tasks_.push_back(task);
        }
        work_ += static_cast<double>(p_.head.key + p_.head.value) * (keys.end - keys.begin) *
                 (count * group_ + 4.0) * p_.kv_num_heads;
      }
    }
    // Longest first, so that no thread is left alone with a long task at the end.
    auto cost = [](const Task& t) { return (t.last_tile - t.first_tile) * (t.count + 4); };
    std::stable_sort(tasks_.begin(), tasks_.end(),
                     [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
    allocate_shared();
  }

  static int64_t tiles_of(int64_t keys) { return (keys + kKeyTile - 1) / kKeyTile; }

  size_t shared_bytes(size_t tiles) const {
    Arena one(nullptr);
    Tile(&one, p_.head, kernels_.packed_size);
    return tiles * one.used();
  }

  // Lists the tiles of `keys` of a segment, by kv head, to be packed before any task runs. Returns
  // the first one's index, or -1 where they would take too much memory.
  int64_t share_tiles(const Segment& segment, Keys keys) {
    const int64_t first = static_cast<int64_t>(shared_.size());
    const int64_t first_tile = keys.begin / kKeyTile, last_tile = tiles_of(keys.end);
    if (shared_bytes(first + (last_tile - first_tile) * p_.kv_num_heads) > kSharedBytes) return -1;
    for (int head = 0; head < p_.kv_num_heads; ++head)
      for (int64_t tile = first_tile; tile < last_tile; ++tile)
        shared_.push_back({&segment, head, tile, keys_of(keys.end, tile), {}});
    return first;
  }

  void allocate_shared() {
    static thread_local ScratchBuffer buffer;
    Arena arena(buffer.reserve(shared_bytes(shared_.size())));
    for (SharedTile& shared : shared_)
      shared.tile = Tile(&arena, p_.head, kernels_.packed_size);
  }

  // Cuts tasks into runs of tiles whose results are kept apart and folded afterwards: where there
  // are too few tasks for the threads; and in decode, which is bound by memory, to let one thread
  // read the tokens of a tile whole, all key/value heads, rather than a head at a time.
  bool split() {
    const size_t wanted = 4 * threads_;
    int64_t tiles = 0;
    int rows = 0;
    for (const Task& task : tasks_) {
      tiles += task.last_tile - task.first_tile;
      rows = std::max(rows, task.count * group_);
    }
    const bool decode = rows <= kRowBlock;
    if (tasks_.size() >= wanted && !decode) return false;
    const int heads =
        decode && static_cast<size_t>(tiles / p_.kv_num_heads) >= wanted ? p_.kv_num_heads : 1;
    const int64_t run = std::max<int64_t>(1, tiles / heads / static_cast<int64_t>(wanted));
    for (size_t i = 0; i < tasks_.size(); i += heads)
      for (int64_t tile = tasks_[i].first_tile; tile < tasks_[i].last_tile; tile += run)
        units_.push_back({&tasks_[i], heads, tile, std::min(tile + run, tasks_[i].last_tile)});
    if (units_.size() == tasks_.size()) return false;
    for (Task& task : tasks_) {
      task.partial = partial_count_;
      partial_count_ += (task.last_tile - task.first_tile) * partial_size(task.count);
    }
    static thread_local ScratchBuffer buffer;
    partials_ = reinterpret_cast<float*>(buffer.reserve(partial_count_ * sizeof(float)));
    return true;
  }

  size_t partial_size(int count) const {
    return static_cast<size_t>(count) * group_ * (value_width_ + 2);
  }

  SoftmaxState partial(const Task& task, int64_t tile) const {
    const size_t rows = static_cast<size_t>(task.count) * group_;
    float* base =
        partials_ + task.partial + (tile - task.first_tile) * partial_size(task.count);
    return {base, base + rows, base + 2 * rows};
  }

  // Keys that one query sees: those of its window, of its span, and any between.
  Keys keys_of_query(const Segment& segment, int64_t query) const {
    const int64_t next = segment.past + query + 1;
    Keys keys{p_.window > 0 ? next - p_.window : 0, p_.causal ? next : segment.keys};
    if (p_.attend_span != nullptr) {
      const int32_t* span = p_.attend_span + 2 * (segment.first_query + query);
      if (span[0] < span[1])
        keys = {std::min<int64_t>(keys.begin, span[0]), std::max<int64_t>(keys.end, span[1])};
    }
    keys.end = std::clamp<int64_t>(keys.end, 0, segment.keys);
    keys.begin = std::clamp<int64_t>(keys.begin, 0, keys.end);
    return keys;
  }

  // From the first to the last key that any of some queries sees.
  Keys keys_of_queries(const Segment& segment, int64_t first, int64_t count) const {
    if (count == 0) return {0, 0};
    Keys keys = keys_of_query(segment, first);
    // Windows advance from query to query; spans need not.
    const int64_t step = p_.attend_span != nullptr ? 1 : std::max<int64_t>(1, count - 1);
    for (int64_t i = step; i < count; i += step) {
      const Keys more = keys_of_query(segment, first + i);
      keys = {std::min(keys.begin, more.begin), std::max(keys.end, more.end)};
    }
    return keys;
  }

  Workspace workspace(const Task& task, int heads = 1) const {
    static thread_local ScratchBuffer buffer;
    const int rows = task.count * group_ * heads;
    const size_t bytes = Workspace(Arena(nullptr), rows, p_.head, kernels_.packed_size).bytes;
    return Workspace(Arena(buffer.reserve(bytes)), rows, p_.head, kernels_.packed_size);
  }

  void run_task(const Task& task) const {
    Workspace space = workspace(task);
    pack_queries(task, space);
    clear(task, space.state);
    Walk walk(*this, {&task, 1, task.first_tile, task.last_tile});
    for (; walk; walk.next()) attend(walk, space, space.state);
    finish(task, space.state);
  }

  void run_unit(const Unit& unit) const {
    const Workspace space = workspace(*unit.tasks, unit.heads);
    const int rows = unit.tasks->count * group_;
    auto of_head = [&](int head) {
      Workspace part = space;
      part.queries.rows = static_cast<float*>(space.queries.rows) + head * rows * key_width_;
      part.queries.scale += head * rows;
      return part;
    };
    for (int head = 0; head < unit.heads; ++head) pack_queries(unit.tasks[head], of_head(head));
    for (Walk walk(*this, unit); walk; walk.next()) {
      const SoftmaxState apart = partial(walk.task(), walk.tile());
      clear(walk.task(), apart);
      attend(walk, of_head(walk.head()), apart);
    }
  }

  void fold_task(const Task& task) const {
    Workspace space = workspace(task);
    clear(task, space.state);
    for (int64_t tile = task.first_tile; tile < task.last_tile; ++tile)
      kernels_.fold(task.count * group_, value_width_, partial(task, tile), space.state);
    finish(task, space.state);
  }

  // Multipliers of the stored elements of the task's head, one per channel.
  void channel_scales(const Task& task, const float* of_segment, const float* of_problem,
                      bool per_channel, int head_size, float* scale) const {
    const float* stored = of_segment != nullptr ? of_segment : of_problem;
    const bool by_channel = of_segment != nullptr || per_channel;
    if (stored != nullptr && by_channel) stored += task.kv_head * head_size;
    for (int d = 0; d < head_size; ++d)
      scale[d] = stored == nullptr ? 1.0f : stored[by_channel ? d : 0];
  }

  void clear(const Task& task, SoftmaxState state) const {
    const int rows = task.count * group_;
    std::fill_n(state.max, rows, kMinusInfinity);
    std::fill_n(state.sum, rows, 0.0f);
    std::fill_n(state.output, static_cast<size_t>(rows) * value_width_, 0.0f);
  }

  // Row r of a task is query r / group of head kv_head * group + r % group.
  int head_of(const Task& task, int row) const { return task.kv_head * group_ + row % group_; }

  void pack_queries(const Task& task, const Workspace& space) const {
    const float* rows[kRowBlock];
    float scale[kMaxHeadSize];
    channel_scales(task, task.segment->key_scale, p_.key_scale, p_.key_scale_per_channel,
                   p_.head.key, scale);
    for (int d = 0; d < p_.head.key; ++d) scale[d] *= p_.scale * kLog2E;
    const int count = task.count * group_;
    for (int first = 0; first < count; first += kRowBlock) {
      const int block = std::min(kRowBlock, count - first);
      for (int i = 0; i < block; ++i) {
        const int r = first + i, head = head_of(task, r);
        const int64_t token = task.segment->first_query + task.first + r / group_;
        rows[i] = p_.query + token * p_.query_stride + static_cast<int64_t>(head) * p_.head.key;
      }
      kernels_.pack_queries(rows, block, p_.head.key, scale, queries_from(space, first));
    }
  }

  PackedQueries queries_from(const Workspace& space, int row) const {
    return {static_cast<float*>(space.queries.rows) + static_cast<size_t>(row) * key_width_,
            space.queries.scale + row};
  }

  // Attends the walk's tile from every row of its task, into whose state it is folded.
  void attend(const Walk& walk, const Workspace& space, SoftmaxState state) const {
    const Task& task = walk.task();
    const Segment& segment = *task.segment;
    const int64_t base = walk.tile() * kKeyTile;
    const int count = keys_of(task.last_key, walk.tile());
    const int rows = task.count * group_;
    const bool shared = task.shared >= 0;
    const bool packed = shared || rows > kFewRows ||
                        std::max(p_.head.key, p_.head.value) > kernels_.unpacked_head_size;
    Tile keys = shared ? shared_[task.shared + walk.tile() - task.first_tile].tile : space.tile;
    if (!shared) hide_unmapped(walk.rows(), &keys);
    if (!shared && packed) kernels_.pack_tile(walk.rows(), walk.ahead(), p_.head, keys.packed);
    for (int first = 0; first < rows; first += kRowBlock) {
      const int block = std::min(kRowBlock, rows - first);
      int begin[kRowBlock], end[kRowBlock];
      float slope[kRowBlock], distance[kRowBlock];
      bool any = false;
      for (int i = 0; i < block; ++i) {
        const Keys seen = keys_of_query(segment, task.first + (first + i) / group_);
        begin[i] = static_cast<int>(std::max<int64_t>(0, seen.begin - base));
        end[i] = static_cast<int>(std::min<int64_t>(count, seen.end - base));
        any |= begin[i] < end[i];
      }
      if (!any) continue;
      if (p_.alibi_slopes != nullptr) find_slopes(task, first, block, base, slope, distance);
      const AttendTile call{queries_from(space, first),
                            block,
                            p_.head,
                            keys.packed,
                            begin,
                            end,
                            keys.unmapped ? keys.bias : nullptr,
                            p_.softcap * kLog2E,
                            p_.alibi_slopes != nullptr ? slope : nullptr,
                            distance,
                            space.scores,
                            space.part,
                            {state.max + first, state.sum + first,
                             state.output + static_cast<size_t>(first) * value_width_}};
      if (packed)
        kernels_.attend(call);
      else
        kernels_.attend_unpacked(call, walk.rows(), walk.ahead());
    }
  }

  // Of the task's rows [first, first + count) and the tile that begins with key `base`.
  void find_slopes(const Task& task, int first, int count, int64_t base, float* slope,
                   float* distance) const {
    for (int i = 0; i < count; ++i) {
      const int row = first + i;
      slope[i] = p_.alibi_slopes[head_of(task, row)] * kLog2E;
      distance[i] = static_cast<float>(base - task.segment->past - task.first - row / group_);
    }
  }

  // How many of a tile's keys lie before `last_key`.
  static int keys_of(int64_t last_key, int64_t tile) {
    return static_cast<int>(std::min<int64_t>(kKeyTile, last_key - tile * kKeyTile));
  }

  // Where keys [base, base + count) are. Rows of unmapped pages and beyond `count` are zero, so
  // that a masked key never brings in NaN from old memory.
  void find_rows(const Segment& segment, int kv_head, int64_t base, int count,
                 TileRows* rows) const {
    const int64_t key_bytes = p_.head.key * element_size_;
    const int64_t value_bytes = p_.head.value * element_size_;
    const int64_t key_stride = p_.kv_num_heads * key_bytes;
    const int64_t value_stride = p_.kv_num_heads * value_bytes;
    const char* keys = static_cast<const char*>(p_.keys) + kv_head * key_bytes;
    const char* values = static_cast<const char*>(p_.values) + kv_head * value_bytes;
    auto place = [&](int i, int end, int64_t row) {
      for (const char *k = keys + row * key_stride, *v = values + row * value_stride; i < end;
           ++i, k += key_stride, v += value_stride) {
        rows->keys[i] = k;
        rows->values[i] = v;
      }
    };
    auto leave_zero = [&](int i, int end) {
      std::fill(rows->keys + i, rows->keys + end, kZeros);
      std::fill(rows->values + i, rows->values + end, kZeros);
    };
    rows->unmapped = false;
    rows->padded = (count + kKeyPadding - 1) / kKeyPadding * kKeyPadding;
    if (p_.block_size == 0) {
      place(0, count, segment.first_key + base);
    } else {
      for (int i = 0; i < count;) {  // a page at a time: a division per key would show
        const int64_t block = segment.blocks[(base + i) / p_.block_size];
        const int64_t offset = (base + i) % p_.block_size;
        const int end = static_cast<int>(std::min<int64_t>(count, i + p_.block_size - offset));
        if (block < 0)
          leave_zero(i, end);
        else
          place(i, end, block * p_.block_size + offset);
        rows->unmapped |= block < 0;
        i = end;
      }
    }
    leave_zero(count, rows->padded);
  }

  static void hide_unmapped(const TileRows& rows, Tile* tile) {
    tile->unmapped = rows.unmapped;
    if (!rows.unmapped) return;
    for (int i = 0; i < rows.padded; ++i)
      tile->bias[i] = rows.keys[i] == kZeros ? kMinusInfinity : 0.0f;
  }

  void pack_shared(SharedTile* shared) const {
    TileRows rows;
    find_rows(*shared->segment, shared->kv_head, shared->index * kKeyTile, shared->count, &rows);
    hide_unmapped(rows, &shared->tile);
    kernels_.pack_tile(rows, TileRows(), p_.head, shared->tile.packed);
  }

  void finish(const Task& task, SoftmaxState state) const {
    const int rows = task.count * group_;
    float scale[kMaxHeadSize];
    channel_scales(task, task.segment->value_scale, p_.value_scale, p_.value_scale_per_channel,
                   p_.head.value, scale);
    for (int r = 0; r < rows; ++r) {
      const int head = head_of(task, r);
      const int64_t token = task.segment->first_query + task.first + r / group_;
      float* out = p_.output + (token * p_.num_heads + head) * p_.head.value;
      const float* in = state.output + static_cast<size_t>(r) * value_width_;
      float sum = state.sum[r], keep = 1.0f;
      if (p_.head_sink != nullptr && p_.head_sink[head] != kMinusInfinity) {
        // One more key with this score and a value of zero.
        const float sink = p_.head_sink[head] * kLog2E, top = std::max(state.max[r], sink);
        keep = std::exp2(state.max[r] - top);
        sum = sum * keep + std::exp2(sink - top);
      }
      const float factor = sum > 0 ? keep / sum : (sum == 0 ? 0.0f : sum);
      for (int d = 0; d < p_.head.value; ++d) out[d] = in[d] * factor * scale[d];
    }
  }

  const KernelContext& context_;
  const AttentionKernels& kernels_;
  const AttentionProblem& p_;
  const int group_;
  const int key_width_, value_width_;  // of a packed query and of a row of output
  const int64_t element_size_;
  // An upper bound: the context does not tell the size of ONNX Runtime's pool. It decides how work
  // is cut, never what is computed.
  const size_t threads_ = std::max(1u, std::thread::hardware_concurrency());
  std::vector<Task> tasks_;
  std::vector<Unit> units_;
  std::vector<SharedTile> shared_;
  double work_ = 0;
  float* partials_ = nullptr;
  size_t partial_count_ = 0;
};

}  // namespace

void run_attention(const KernelContext& context, const AttentionKernels& kernels,
                   const AttentionProblem& problem) {
  Run(context, kernels, problem).execute();
}

}  // namespace glmcompile
