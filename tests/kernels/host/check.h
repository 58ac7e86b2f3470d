// The least of a test runner: named cases, and failures that say what was expected.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "twin.h"

namespace host {

using Case = std::pair<std::string, std::function<std::string()>>;  // an empty string is a pass

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Add {
  Add(const char* name, std::function<std::string()> body) { cases().emplace_back(name, std::move(body)); }
};

inline std::string shown(const std::vector<twin::Finding>& findings) {
  std::string text;
  for (const twin::Finding& finding : findings) {
    const std::string file = finding.file;
    text += "\n    " + finding.kind + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(finding.line) +
            ": " + finding.text;
  }
  return text.empty() ? " nothing" : text;
}

// A pass if the findings are exactly one kind, all of them at the line.
inline std::string only(const std::vector<twin::Finding>& findings, const std::string& kind, int line) {
  bool good = !findings.empty();
  for (const twin::Finding& finding : findings) good = good && finding.kind == kind && finding.line == line;
  return good ? "" : "expected " + kind + " at line " + std::to_string(line) + ", got" + shown(findings);
}

// A pass if one of the findings is of this kind at this line: what races is seen from both sides.
inline std::string some(const std::vector<twin::Finding>& findings, const std::string& kind, int line) {
  for (const twin::Finding& finding : findings) {
    if (finding.kind == kind && finding.line == line) return "";
  }
  return "expected " + kind + " at line " + std::to_string(line) + ", got" + shown(findings);
}

inline std::string none(const std::vector<twin::Finding>& findings) {
  return findings.empty() ? "" : "expected no finding, got" + shown(findings);
}

inline int run_all() {
  int failed = 0;
  for (const auto& [name, body] : cases()) {
    const std::string problem = body();
    if (!problem.empty()) {
      ++failed;
      std::printf("FAILED %s: %s\n", name.c_str(), problem.c_str());
    }
  }
  std::printf("%zu cases, %d failed\n", cases().size(), failed);
  return failed == 0 ? 0 : 1;
}

// The same until one fails, those whose name begins with `first` before all others.
inline int run_until_one_fails(const std::string& first) {
  const auto wanted = [&](const Case& one) { return one.first.compare(0, first.size(), first) == 0; };
  std::stable_partition(cases().begin(), cases().end(), wanted);
  for (const auto& [name, body] : cases()) {
    const std::string problem = body();
    if (problem.empty()) continue;
    std::printf("FAILED %s: %s\n1 failed\n", name.c_str(), problem.c_str());
    return 1;
  }
  std::printf("%zu cases, 0 failed\n", cases().size());
  return 0;
}

}  // namespace host

#define TAPS_CASE(name)                           \
  static std::string name();                      \
  static const host::Add add_##name(#name, name); \
  static std::string name()
