// For tests of the stand-in for CUDA: runs kernels with a mistake and expects its message.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "check.h"
#include "cuda_on_cpu.h"

constexpr uint64_t kSeeds[] = {0, 1, 2, 3};

// Runs `body` in another process and returns what it wrote to stderr, if a signal ended it.
template <class F>
std::string last_words(F body) {
  int ends[2];
  if (pipe(ends)) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char piece[4096];
  for (ssize_t n; (n = read(ends[0], piece, sizeof piece)) > 0;) words.append(piece, size_t(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status ? words : "no fault: " + words;
}

template <class F>
void expect_fault(const char* wanted, F body) {
  const std::string words = last_words(body);
  check::expect(words.rfind("no fault", 0) != 0 && words.find(wanted) != std::string::npos, "not '%s' but '%s'", wanted,
                words.c_str());
}

// A kernel of one block of 64 threads with a mistake.
template <class F>
void expect_fault_of_kernel(const char* wanted, F body) {
  for (uint64_t seed : kSeeds)
    expect_fault(wanted, [&] {
      cuda_on_cpu::set_seed(seed);
      cuda_on_cpu::launch(1, 64, 20, body);
    });
}
