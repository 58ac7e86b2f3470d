#include "twin.h"

#include <algorithm>
#include <memory>
#include <random>
#include <utility>

#include "fiber.h"

namespace twin {
namespace {

using Clock = std::vector<uint32_t>;  // by thread of a cluster: how much of it has been seen

void join(Clock& into, const Clock& other) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

constexpr uint32_t kGrain = 2;  // bytes of shared memory to a cell

// What happened to a cell: its last write, and the reads since. (FastTrack, Flanagan and Freund 2009.)
struct Cell {
  uint32_t write_clock = 0;
  uint32_t read_clock = 0;
  uint16_t writer = 0;
  uint16_t reader = 0;
  bool written = false;
  bool pending = false;            // an asynchronous copy is on its way
  std::unique_ptr<Clock> readers;  // several reads that no order joins
};

struct Copy {
  uint32_t at;
  uint32_t size;   // in shared memory
  uint32_t bytes;  // of it that are read
  const void* source;
  Where where;
};

struct Thread {
  Fiber fiber;
  Clock clock;
  std::vector<Copy> issued;               // since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  const char* waits_for = nullptr;        // while blocked
  Where waits_at{nullptr, 0};
};

struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
  Clock joined;
  Clock released;  // of the generation before
};

struct Warp {
  Barrier sync;
  const char* what = nullptr;
  Where where{nullptr, 0};
  uint32_t bytes = 0;
  unsigned arrived = 0;
  uint64_t generation = 0;
  std::vector<unsigned char> slots[2];
};

// The last read of a block's memory by a thread of another block.
struct Visit {
  uint32_t clock = 0;
  Where where{nullptr, 0};
};

struct Block {
  Dim index;
  std::vector<unsigned char> memory;
  std::vector<Cell> cells;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<Visit> visits;  // by thread of the cluster
  Clock ended;                // what its threads had seen when they ended
  unsigned threads_ended = 0;
};

// Blocks that run together: one, where a launch has no clusters.
struct Cluster {
  Dim grid;
  unsigned size = 0;  // threads of a block
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;  // of the first block, the second, ...; there may be more
  Barrier barrier;
  unsigned current = 0;    // thread of the cluster
  Block* block = nullptr;  // its block
  unsigned thread = 0;     // its number in the block
  uint64_t progress = 0;   // waits that ended
  std::vector<Finding> findings;
};

Cluster* cluster_ = nullptr;  // the launch that runs; one at a time

Thread& self() { return *cluster_->threads[cluster_->current]; }
Block& own() { return *cluster_->block; }
unsigned all_threads() { return blocks() * cluster_->size; }

void found(const char* kind, std::string text, Where where) {
  for (const Finding& finding : cluster_->findings) {
    if (finding.kind == kind && finding.line == where.line && finding.file == where.file) return;
  }
  cluster_->findings.push_back({kind, std::move(text), where.file, where.line});
}

std::string shown(unsigned thread) {
  const std::string in_block = "thread " + std::to_string(thread % cluster_->size);
  return cluster_->blocks.size() == 1 ? in_block : in_block + " of block " + std::to_string(thread / cluster_->size);
}

std::string named(const char* what, unsigned thread) { return std::string(what) + " by " + shown(thread); }

template <class Ready>
void wait_until(const char* what, Where where, Ready ready) {
  Thread& thread = self();
  thread.waits_for = what;
  thread.waits_at = where;
  while (!ready()) thread.fiber.yield();
  thread.waits_for = nullptr;
  ++cluster_->progress;
}

bool inside(uint32_t at, uint32_t bytes, Where where) {
  if (at % bytes != 0) {
    found("misaligned", "address " + std::to_string(at) + " for " + std::to_string(bytes) + " bytes", where);
  }
  if (at + bytes <= own().memory.size()) return true;
  found("out of range",
        "bytes " + std::to_string(at) + " to " + std::to_string(at + bytes) + " of " +
            std::to_string(own().memory.size()),
        where);
  return false;
}

template <class Each>
void cells_of(Block& block, uint32_t at, uint32_t bytes, Each each) {
  for (uint32_t i = at / kGrain; i <= (at + bytes - 1) / kGrain; ++i) each(block.cells[i]);
}

void note_read(Cell& cell, Where where) {
  const unsigned me = cluster_->current;
  const Clock& clock = self().clock;
  if (cell.pending) {
    found("pending copy", named("read of an asynchronous copy that was not waited for,", me), where);
  } else if (!cell.written) {
    found("uninitialised", named("read of shared memory that nothing wrote,", me), where);
  }
  if (cell.write_clock > clock[cell.writer]) {
    found("race", named("read", me) + " of what " + shown(cell.writer) + " wrote, unordered", where);
  }
  if (cell.readers) {
    (*cell.readers)[me] = clock[me];
  } else if (cell.read_clock <= clock[cell.reader]) {
    cell.reader = static_cast<uint16_t>(me);
    cell.read_clock = clock[me];
  } else {
    cell.readers = std::make_unique<Clock>(all_threads(), 0u);
    (*cell.readers)[cell.reader] = cell.read_clock;
    (*cell.readers)[me] = clock[me];
  }
}

void note_write(Cell& cell, Where where) {
  const unsigned me = cluster_->current;
  const Clock& clock = self().clock;
  const auto racing = [&](const char* what, unsigned other) {
    found("race", named("write", me) + " over " + what + " " + shown(other) + ", unordered", where);
  };
  if (cell.pending) found("pending copy", named("write over an asynchronous copy in flight,", me), where);
  if (cell.write_clock > clock[cell.writer]) racing("a write of", cell.writer);
  if (cell.readers) {
    for (unsigned i = 0; i < all_threads(); ++i) {
      if ((*cell.readers)[i] > clock[i]) racing("a read of", i);
    }
    cell.readers.reset();
  } else if (cell.read_clock > clock[cell.reader]) {
    racing("a read of", cell.reader);
  }
  cell.read_clock = 0;
  cell.writer = static_cast<uint16_t>(me);
  cell.write_clock = clock[me];
  cell.written = true;
}

// A barrier takes each clock at its arrival; what a thread does after `bar_arrive` is not ordered by it.
void meet(Barrier& barrier, unsigned expected, bool waits, const char* what, Where where) {
  Thread& thread = self();
  const unsigned me = cluster_->current;
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.joined.assign(all_threads(), 0);
  } else if (barrier.expected != expected) {
    found("barrier",
          std::string(what) + " for " + std::to_string(expected) + " threads, others wait for " +
              std::to_string(barrier.expected),
          where);
  }
  join(barrier.joined, thread.clock);
  ++thread.clock[me];
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.released = barrier.joined;
    barrier.arrived = 0;
    ++barrier.generation;
  }
  if (!waits) return;
  wait_until(what, where, [&] { return barrier.generation != generation; });
  join(thread.clock, barrier.released);
}

// What a block leaves behind is gone: every read of it by other blocks has to be ordered before the end of one of its
// threads, whatever the order here was.
void end(const Thread& thread) {
  Block& block = own();
  join(block.ended, thread.clock);
  if (++block.threads_ended < cluster_->size) return;
  for (unsigned i = 0; i < all_threads(); ++i) {
    const Visit& visit = block.visits[i];
    if (visit.clock > block.ended[i]) found("ended", named("read of a block that may have ended,", i), visit.where);
  }
}

// Everything that a cluster's threads can still do, in the order of the threads or in a random one.
void run(Cluster& cluster, const std::function<void()>& body, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<unsigned> order(all_threads());
  for (unsigned i = 0; i < order.size(); ++i) {
    order[i] = i;
    cluster.threads[i]->fiber.start([&body] {
      body();
      const Thread& thread = self();
      if (!thread.issued.empty()) found("pending copy", "exit with an uncommitted copy", thread.issued[0].where);
      for (const auto& group : thread.groups) {
        if (!group.empty()) found("pending copy", "exit with a copy in flight", group[0].where);
      }
      end(thread);
    });
  }
  std::size_t live = order.size();
  while (live > 0) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    live = 0;
    const uint64_t before = cluster.progress;
    bool moved = false;
    for (const unsigned i : order) {
      Thread& thread = *cluster.threads[i];
      if (thread.fiber.done()) continue;
      const bool fresh = thread.waits_for == nullptr;  // not yet begun
      cluster.current = i;
      cluster.block = &cluster.blocks[i / cluster.size];
      cluster.thread = i % cluster.size;
      thread.fiber.resume();
      moved |= fresh || thread.fiber.done();
      live += !thread.fiber.done();
    }
    if (live > 0 && !moved && cluster.progress == before) {
      unsigned waiting = 0;
      const Thread* first = nullptr;
      for (unsigned i = 0; i < order.size(); ++i) {
        const Thread* const thread = cluster.threads[i].get();
        if (thread->fiber.done()) continue;
        ++waiting;
        if (!first) first = thread;
      }
      found("deadlock",
            std::string(first->waits_for) + " never completes: " + std::to_string(waiting) + " threads wait, " +
                std::to_string(order.size() - waiting) + " have ended",
            first->waits_at);
      return;
    }
  }
}

// All as it is when a cluster begins whose first block is this one.
void begin(Cluster& cluster, Dim first, Dim size, std::size_t shared_bytes) {
  const unsigned all = all_threads();
  for (unsigned rank = 0; rank < cluster.blocks.size(); ++rank) {
    Block& block = cluster.blocks[rank];
    block.index = {first.x + rank % size.x, first.y + rank / size.x % size.y, first.z + rank / size.x / size.y};
    block.memory.assign(shared_bytes, 0xff);  // NaN in every floating-point type
    for (Cell& cell : block.cells) cell = Cell{};
    for (Barrier& barrier : block.barriers) barrier = Barrier{};
    block.warps.assign((cluster.size + 31) / 32, Warp{});
    block.visits.assign(all, Visit{});
    block.ended.assign(all, 0);
    block.threads_ended = 0;
  }
  cluster.barrier = Barrier{};
  for (unsigned i = 0; i < all; ++i) {
    Thread& thread = *cluster.threads[i];
    thread.clock.assign(all, 0);
    thread.clock[i] = 1;
    thread.issued.clear();
    thread.groups.clear();
    thread.waits_for = nullptr;
  }
}

}  // namespace

std::vector<Finding> launch(Dim grid, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body,
                            uint64_t seed, Dim size) {
  const unsigned blocks = size.x * size.y * size.z;
  const bool whole = blocks > 0 && grid.x % size.x == 0 && grid.y % size.y == 0 && grid.z % size.z == 0;
  if (!whole || blocks > taps::dev::kMostOfCluster) {
    return {{"launch", "clusters that do not fill the grid, or of more than eight blocks", __FILE__, __LINE__}};
  }
  Cluster cluster;
  cluster.grid = grid;
  cluster.size = threads;
  cluster.blocks.resize(blocks);
  for (Block& block : cluster.blocks) block.cells.resize(shared_bytes / kGrain + 8);
  static std::vector<std::unique_ptr<Thread>> spare;  // of the launch before: stacks cost more than small blocks do
  cluster.threads = std::exchange(spare, {});
  while (cluster.threads.size() < blocks * threads) cluster.threads.push_back(std::make_unique<Thread>());
  Cluster* const outer = cluster_;
  cluster_ = &cluster;
  for (unsigned z = 0; z < grid.z; z += size.z) {
    for (unsigned y = 0; y < grid.y; y += size.y) {
      for (unsigned x = 0; x < grid.x; x += size.x) {
        begin(cluster, {x, y, z}, size, shared_bytes);
        run(cluster, body, seed == 0 ? 0 : seed + x + 1000 * y + 1000000 * z);
      }
    }
  }
  cluster_ = outer;
  spare = std::move(cluster.threads);
  return std::move(cluster.findings);
}

void report(const char* kind, const std::string& text, Where where) { found(kind, text, where); }
unsigned thread() { return cluster_->thread; }
unsigned threads() { return cluster_->size; }
Dim block() { return own().index; }
Dim grid() { return cluster_->grid; }
unsigned rank() { return cluster_->current / cluster_->size; }
unsigned blocks() { return static_cast<unsigned>(cluster_->blocks.size()); }

void read(uint32_t at, void* out, uint32_t bytes, Where where) {
  std::memset(out, 0xff, bytes);
  if (!inside(at, bytes, where)) return;
  cells_of(own(), at, bytes, [&](Cell& cell) { note_read(cell, where); });
  std::memcpy(out, own().memory.data() + at, bytes);
}

void read_of(unsigned of, uint32_t at, void* out, uint32_t bytes, Where where) {
  std::memset(out, 0xff, bytes);
  if (of >= blocks()) {
    found("out of range", "block " + std::to_string(of) + " of a cluster of " + std::to_string(blocks()), where);
    return;
  }
  if (!inside(at, bytes, where)) return;
  Block& block = cluster_->blocks[of];
  const unsigned me = cluster_->current;
  if (of != rank()) {
    if (block.threads_ended == cluster_->size) found("ended", named("read of a block that has ended,", me), where);
    block.visits[me] = {self().clock[me], where};
  }
  cells_of(block, at, bytes, [&](Cell& cell) { note_read(cell, where); });
  std::memcpy(out, block.memory.data() + at, bytes);
}

void write(uint32_t at, const void* in, uint32_t bytes, Where where) {
  if (!inside(at, bytes, where)) return;
  cells_of(own(), at, bytes, [&](Cell& cell) { note_write(cell, where); });
  std::memcpy(own().memory.data() + at, in, bytes);
}

void copy_async(uint32_t at, const void* source, uint32_t size, uint32_t bytes, Where where) {
  if (bytes > size) found("misuse", "cp.async of " + std::to_string(bytes) + " bytes", where);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(source) % size != 0) found("misaligned", "cp.async's source", where);
  if (!inside(at, size, where)) return;
  cells_of(own(), at, size, [&](Cell& cell) {
    note_write(cell, where);
    cell.pending = true;
  });
  std::memset(own().memory.data() + at, 0xff, size);
  self().issued.push_back({at, size, std::min(bytes, size), source, where});
}

void copy_commit(Where) {
  Thread& thread = self();
  thread.groups.push_back(std::move(thread.issued));
  thread.issued.clear();
}

void copy_wait(unsigned in_flight, Where where) {
  Thread& thread = self();
  while (thread.groups.size() > in_flight) {
    for (const Copy& copy : thread.groups.front()) {
      unsigned char* const target = own().memory.data() + copy.at;
      std::memset(target, 0, copy.size);
      std::memcpy(target, copy.source, copy.bytes);
      cells_of(own(), copy.at, copy.size, [&](Cell& cell) {
        cell.pending = false;
        note_write(cell, where);
      });
    }
    thread.groups.erase(thread.groups.begin());
  }
}

void barrier(int id, unsigned threads, bool waits, Where where) {
  if (id < 0 || id > 15 || threads == 0 || threads % 32 != 0 || threads > cluster_->size) {
    found("barrier", "barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads", where);
    return;
  }
  meet(own().barriers[id], threads, waits, waits ? "a barrier" : "an arrival", where);
}

void warp_barrier(Where where) {
  const unsigned first = thread() / 32 * 32;
  meet(own().warps[first / 32].sync, std::min(32u, cluster_->size - first), true, "warp_sync", where);
}

// Threads that have ended count on a GPU as if they had come; here they are missed.
void cluster_barrier(Where where) { meet(cluster_->barrier, all_threads(), true, "a cluster's barrier", where); }

const unsigned char* exchange(const char* what, const void* mine, uint32_t bytes, Where where) {
  const unsigned lane = thread() % 32;
  Warp& warp = own().warps[thread() / 32];
  if (warp.arrived == 0) {
    warp.what = what;
    warp.where = where;
    warp.bytes = bytes;
  } else if (warp.what != what || warp.where.line != where.line || warp.bytes != bytes) {
    found("divergence",
          std::string(what) + " where other lanes are in " + warp.what + " of line " + std::to_string(warp.where.line),
          where);
  }
  const uint64_t generation = warp.generation;
  std::vector<unsigned char>& slot = warp.slots[generation % 2];
  slot.resize(std::max<std::size_t>(slot.size(), 32 * 64));
  std::memcpy(slot.data() + lane * bytes, mine, bytes);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
  }
  wait_until(what, where, [&] { return warp.generation != generation; });
  return slot.data();
}

}  // namespace twin
