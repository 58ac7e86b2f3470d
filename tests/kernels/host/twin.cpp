#include "twin.h"

#include <algorithm>
#include <memory>
#include <random>

#include "fiber.h"

namespace twin {
namespace {

using Clock = std::vector<uint32_t>;  // by thread: how much of it has been seen

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

struct Block {
  Dim index, grid;
  unsigned size = 0;
  std::vector<unsigned char> memory;
  std::vector<Cell> cells;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  unsigned current = 0;
  uint64_t progress = 0;  // waits that ended
  std::vector<Finding> findings;
};

Block* block_ = nullptr;  // the launch that runs; one at a time

Thread& self() { return *block_->threads[block_->current]; }

void found(const char* kind, std::string text, Where where) {
  for (const Finding& finding : block_->findings) {
    if (finding.kind == kind && finding.line == where.line && finding.file == where.file) return;
  }
  block_->findings.push_back({kind, std::move(text), where.file, where.line});
}

std::string named(const char* what, unsigned thread) {
  return std::string(what) + " by thread " + std::to_string(thread);
}

template <class Ready>
void wait_until(const char* what, Where where, Ready ready) {
  Thread& thread = self();
  thread.waits_for = what;
  thread.waits_at = where;
  while (!ready()) thread.fiber.yield();
  thread.waits_for = nullptr;
  ++block_->progress;
}

bool inside(uint32_t at, uint32_t bytes, Where where) {
  if (at % bytes != 0) {
    found("misaligned", "address " + std::to_string(at) + " for " + std::to_string(bytes) + " bytes", where);
  }
  if (at + bytes <= block_->memory.size()) return true;
  found("out of range",
        "bytes " + std::to_string(at) + " to " + std::to_string(at + bytes) + " of " +
            std::to_string(block_->memory.size()),
        where);
  return false;
}

template <class Visit>
void cells_of(uint32_t at, uint32_t bytes, Visit visit) {
  for (uint32_t i = at / kGrain; i <= (at + bytes - 1) / kGrain; ++i) visit(block_->cells[i]);
}

void note_read(Cell& cell, Where where) {
  const unsigned me = block_->current;
  const Clock& clock = self().clock;
  if (cell.pending) {
    found("pending copy", named("read of an asynchronous copy that was not waited for,", me), where);
  } else if (!cell.written) {
    found("uninitialised", named("read of shared memory that nothing wrote,", me), where);
  }
  if (cell.write_clock > clock[cell.writer]) {
    found("race", named("read", me) + " of what thread " + std::to_string(cell.writer) + " wrote, unordered", where);
  }
  if (cell.readers) {
    (*cell.readers)[me] = clock[me];
  } else if (cell.read_clock <= clock[cell.reader]) {
    cell.reader = static_cast<uint16_t>(me);
    cell.read_clock = clock[me];
  } else {
    cell.readers = std::make_unique<Clock>(block_->size, 0u);
    (*cell.readers)[cell.reader] = cell.read_clock;
    (*cell.readers)[me] = clock[me];
  }
}

void note_write(Cell& cell, Where where) {
  const unsigned me = block_->current;
  const Clock& clock = self().clock;
  const auto racing = [&](const char* what, unsigned other) {
    found("race", named("write", me) + " over " + what + " thread " + std::to_string(other) + ", unordered", where);
  };
  if (cell.pending) found("pending copy", named("write over an asynchronous copy in flight,", me), where);
  if (cell.write_clock > clock[cell.writer]) racing("a write of", cell.writer);
  if (cell.readers) {
    for (unsigned i = 0; i < block_->size; ++i) {
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
  const unsigned me = block_->current;
  if (barrier.arrived == 0) {
    barrier.expected = expected;
    barrier.joined.assign(block_->size, 0);
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

// Everything that a block's threads can still do, in the order of the threads or in a random one.
void run(Block& block, const std::function<void()>& body, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<unsigned> order(block.size);
  for (unsigned i = 0; i < block.size; ++i) {
    order[i] = i;
    block.threads[i]->fiber.start([&block, &body] {
      body();
      Thread& thread = *block.threads[block.current];
      if (!thread.issued.empty()) found("pending copy", "exit with an uncommitted copy", thread.issued[0].where);
      for (const auto& group : thread.groups) {
        if (!group.empty()) found("pending copy", "exit with a copy in flight", group[0].where);
      }
    });
  }
  std::size_t live = block.size;
  while (live > 0) {
    if (seed != 0) std::shuffle(order.begin(), order.end(), random);
    live = 0;
    const uint64_t before = block.progress;
    bool moved = false;
    for (const unsigned i : order) {
      Thread& thread = *block.threads[i];
      if (thread.fiber.done()) continue;
      const bool fresh = thread.waits_for == nullptr;  // not yet begun
      block.current = i;
      thread.fiber.resume();
      moved |= fresh || thread.fiber.done();
      live += !thread.fiber.done();
    }
    if (live > 0 && !moved && block.progress == before) {
      unsigned waiting = 0;
      const Thread* first = nullptr;
      for (const auto& thread : block.threads) {
        if (thread->fiber.done()) continue;
        ++waiting;
        if (!first) first = thread.get();
      }
      found("deadlock",
            std::string(first->waits_for) + " never completes: " + std::to_string(waiting) + " threads wait, " +
                std::to_string(block.size - waiting) + " have ended",
            first->waits_at);
      return;
    }
  }
}

}  // namespace

std::vector<Finding> launch(Dim grid, unsigned threads, std::size_t shared_bytes, const std::function<void()>& body,
                            uint64_t seed) {
  Block block;
  block.grid = grid;
  block.size = threads;
  block.cells.resize(shared_bytes / kGrain + 8);
  block.threads.resize(threads);
  for (auto& thread : block.threads) thread = std::make_unique<Thread>();
  Block* const outer = block_;
  block_ = &block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        block.memory.assign(shared_bytes, 0xff);  // NaN in every floating-point type
        for (Cell& cell : block.cells) cell = Cell{};
        for (Barrier& barrier : block.barriers) barrier = Barrier{};
        block.warps.assign((threads + 31) / 32, Warp{});
        for (unsigned i = 0; i < threads; ++i) {
          Thread& thread = *block.threads[i];
          thread.clock.assign(threads, 0);
          thread.clock[i] = 1;
          thread.issued.clear();
          thread.groups.clear();
          thread.waits_for = nullptr;
        }
        run(block, body, seed == 0 ? 0 : seed + x + 1000 * y + 1000000 * z);
      }
    }
  }
  block_ = outer;
  return std::move(block.findings);
}

void report(const char* kind, const std::string& text, Where where) { found(kind, text, where); }
unsigned thread() { return block_->current; }
unsigned threads() { return block_->size; }
Dim block() { return block_->index; }
Dim grid() { return block_->grid; }

void read(uint32_t at, void* out, uint32_t bytes, Where where) {
  std::memset(out, 0xff, bytes);
  if (!inside(at, bytes, where)) return;
  cells_of(at, bytes, [&](Cell& cell) { note_read(cell, where); });
  std::memcpy(out, block_->memory.data() + at, bytes);
}

void write(uint32_t at, const void* in, uint32_t bytes, Where where) {
  if (!inside(at, bytes, where)) return;
  cells_of(at, bytes, [&](Cell& cell) { note_write(cell, where); });
  std::memcpy(block_->memory.data() + at, in, bytes);
}

void copy_async(uint32_t at, const void* source, uint32_t size, uint32_t bytes, Where where) {
  if (bytes > size) found("misuse", "cp.async of " + std::to_string(bytes) + " bytes", where);
  if (bytes > 0 && reinterpret_cast<uintptr_t>(source) % size != 0) found("misaligned", "cp.async's source", where);
  if (!inside(at, size, where)) return;
  cells_of(at, size, [&](Cell& cell) {
    note_write(cell, where);
    cell.pending = true;
  });
  std::memset(block_->memory.data() + at, 0xff, size);
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
      unsigned char* const target = block_->memory.data() + copy.at;
      std::memset(target, 0, copy.size);
      std::memcpy(target, copy.source, copy.bytes);
      cells_of(copy.at, copy.size, [&](Cell& cell) {
        cell.pending = false;
        note_write(cell, where);
      });
    }
    thread.groups.erase(thread.groups.begin());
  }
}

void barrier(int id, unsigned threads, bool waits, Where where) {
  if (id < 0 || id > 15 || threads == 0 || threads % 32 != 0 || threads > block_->size) {
    found("barrier", "barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads", where);
    return;
  }
  meet(block_->barriers[id], threads, waits, waits ? "a barrier" : "an arrival", where);
}

void warp_barrier(Where where) {
  const unsigned first = block_->current / 32 * 32;
  meet(block_->warps[first / 32].sync, std::min(32u, block_->size - first), true, "warp_sync", where);
}

const unsigned char* exchange(const char* what, const void* mine, uint32_t bytes, Where where) {
  const unsigned lane = block_->current % 32;
  Warp& warp = block_->warps[block_->current / 32];
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
