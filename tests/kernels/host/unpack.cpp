// W_t of a packed Delta on the twin: all codecs, types, alignments, tails, gates, and bitmaps that lie.
#include "unpack_case.h"

using namespace host;  // NOLINT

namespace {

constexpr How kHow[] = {How::kClosed, How::kOpen, How::kReadClosed, How::kReadOpen};

int problems = 0;

std::string checked(const Packing& packing) {
  ++problems;
  return check_unpack(packing);
}

}  // namespace

TAPS_CASE(unpacked_in_every_type) {
  for (const Codec codec : kCodecs) {
    for (const Dtype out : kDtypes) {
      for (const Dtype weight : kDtypes) {
        for (const How how : kHow) {
          Packing p{codec, 3 + problems % 5, 29 + problems % 7, out, weight};
          p.how = how, p.seed = static_cast<uint64_t>(problems % 3);
          if (std::string wrong = checked(p); !wrong.empty()) {
            return "types " + std::to_string(static_cast<int>(out)) + std::to_string(static_cast<int>(weight)) +
                   " gate " + std::to_string(static_cast<int>(how)) + ": " + wrong;
          }
        }
      }
    }
  }
  return "";
}

// Less than a vector, a group, a tile, and a grid that goes round: one multiprocessor holds eight tiles. Rows that end
// anywhere in a vector, or several of them in one.
TAPS_CASE(unpacked_in_every_size) {
  for (const Codec codec : kCodecs) {
    for (const int64_t count : {0, 1, 7, 8, 9, 31, 32, 33, 255, 1023, 1024, 1025, 2047, 2048, 2049, 4099, 16387}) {
      Packing p{codec, 1, count, Dtype::kBFloat16, Dtype::kBFloat16};
      p.how = count % 2 == 0 ? How::kOpen : How::kReadOpen, p.seed = static_cast<uint64_t>(count % 3);
      if (std::string wrong = checked(p); !wrong.empty()) return wrong;
      p.rows = count, p.columns = 1, p.weight = Dtype::kFloat32;
      if (std::string wrong = checked(p); !wrong.empty()) return wrong;
    }
    for (const auto& [rows, columns] : {std::pair<int64_t, int64_t>{0, 5},
                                        {5, 0},
                                        {40, 3},
                                        {9, 7},
                                        {9, 8},
                                        {9, 9},
                                        {31, 33},
                                        {64, 64},
                                        {3, 1000},
                                        {1000, 3}}) {
      Packing p{codec, rows, columns, Dtype::kFloat16, Dtype::kFloat16};
      if (std::string wrong = checked(p); !wrong.empty()) return wrong;
    }
  }
  return "";
}

// Each operand alone off the places that vectors need.
TAPS_CASE(unpacked_from_anywhere) {
  for (const Codec codec : kCodecs) {
    for (const Dtype dtype : kDtypes) {
      for (const int64_t offset : {1, 3, 4}) {
        for (int operand = 0; operand < 3; ++operand) {
          Packing p{codec, 5, 67, dtype, dtype};
          (operand == 0 ? p.out_offset : operand == 1 ? p.weight_offset : p.codes_offset) = offset;
          p.bits_behind = problems % 2 == 0;
          if (std::string wrong = checked(p); !wrong.empty()) return wrong;
        }
      }
    }
  }
  return "";
}

TAPS_CASE(unpacked_alone) {
  for (const Codec codec : kCodecs) {
    for (const How how : kHow) {
      Packing p{codec, 11, 45};
      p.no_weight = true, p.how = how;
      if (std::string wrong = checked(p); !wrong.empty()) return wrong;
    }
  }
  return "";
}

// Chunks of one tile and of several, the last one short or of a single element; counted by words and byte by byte.
TAPS_CASE(bitmaps_in_chunks) {
  for (const int64_t tiles : {1, 2, 3}) {
    for (const int64_t rest : {0, 1, 2047}) {
      for (const int64_t offset : {0, 5}) {
        for (const double share : {0.0, 0.05, 1.0}) {
          Packing p{Codec::kBitmask, 1, 5 * kUnpackTile + rest, Dtype::kBFloat16, Dtype::kBFloat16};
          p.chunk = tiles * kUnpackTile, p.codes_offset = offset, p.share = share;
          p.how = rest == 1 ? How::kReadOpen : How::kOpen, p.seed = static_cast<uint64_t>(tiles);
          if (std::string wrong = checked(p); !wrong.empty()) return wrong;
        }
      }
    }
  }
  Packing closed{Codec::kBitmask, 3, 2 * kUnpackTile};
  closed.how = How::kReadClosed;
  return checked(closed);
}

// Fewer values than bits, by one, by many, none at all: zeros. More: nobody asks for them.
TAPS_CASE(bitmaps_that_lie) {
  for (const int64_t missing : {1, 2, 700, 1 << 20, -1, -1000}) {
    for (const int64_t count : {33, 2048, 3 * 2048 + 77}) {
      for (const int64_t offset : {0, 1}) {
        Packing p{Codec::kBitmask, 1, count, Dtype::kFloat32, Dtype::kFloat32};
        p.missing = missing, p.codes_offset = offset, p.share = 0.7;
        if (std::string wrong = checked(p); !wrong.empty()) return wrong;
      }
    }
  }
  return "";
}

// The chunks that a launch makes: one for each tile up to 1,024 tiles, then larger ones.
TAPS_CASE(chunks_of_every_layer) {
  PackedDelta delta;
  delta.codec = Codec::kBitmask, delta.rows = 1;
  for (const int64_t tiles : {0, 1, 2, 1023, 1024, 1025, 2048, 2049, 1 << 20}) {
    for (const int64_t rest : {-1, 0, 1}) {
      ++problems;
      delta.columns = tiles * kUnpackTile + rest < 0 ? 0 : tiles * kUnpackTile + rest;
      Unpack args;
      args.delta = delta, args.chunk = unpack_chunk(delta);
      const int64_t chunks = args.chunks();
      const bool all = chunks * args.chunk >= delta.columns && (chunks - 1) * args.chunk < delta.columns;
      const bool least =
          chunks <= 1024 && (args.chunk <= kUnpackTile || delta.columns > 1024 * (args.chunk - kUnpackTile));
      if (args.chunk % kUnpackTile != 0 || !least || (delta.columns > 0 && !all) || (delta.columns == 0 && chunks != 0))
        return "expected other chunks of " + std::to_string(delta.columns) + ", got " + std::to_string(args.chunk);
    }
  }
  return "";
}

int main() {
  const int failed = run_all();
  std::printf("%d problems\n", problems);
  return failed;
}
