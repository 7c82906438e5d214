// Reads and writes whole files.
#pragma once

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace example {

inline std::vector<char> read_file(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) throw std::runtime_error(path + " is no file");
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes(file ? std::filesystem::file_size(path) : 0);
  if (!file.read(bytes.data(), std::streamsize(bytes.size()))) throw std::runtime_error(path + " cannot be read");
  return bytes;
}

// Replaces a file atomically: at any time it is the old one or the new one.
inline void write_file(const std::string& path, const std::vector<char>& bytes) {
  const std::string aside = path + ".tmp";
  std::ofstream file(aside, std::ios::binary);
  file.write(bytes.data(), std::streamsize(bytes.size()));
  file.close();
  if (!file || std::rename(aside.c_str(), path.c_str())) {
    std::remove(aside.c_str());
    throw std::runtime_error(path + " cannot be written");
  }
}

}  // namespace example
