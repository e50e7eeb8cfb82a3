// Shared memory of a block: the dynamic part, and the kernels' static variables.
//
// The latter are C++ statics, which keep their values from block to block. To fill them, they are looked up in
// the executable's own symbol table: local variables (_ZZ, Itanium C++ ABI 5.1.6) of functions in mac_attn::cuda.
// (A section attribute would be simpler, but GCC ignores it for statics of templates, its bug 41091.)
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "machine.h"
#include "sanitizers.h"

namespace mac_attn::simt {

namespace {

struct Variable {
  char* address;
  size_t size;  // Clang counts ASan's zone behind the variable in
};

uintptr_t load_address() {
  uintptr_t address = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        *static_cast<uintptr_t*>(result) = info->dlpi_addr;
        return 1;  // the first one is the executable
      },
      &address);
  return address;
}

std::vector<Variable> find_static_shared() {
  std::vector<Variable> found;
  const int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return found;
  const size_t size = static_cast<size_t>(status.st_size);
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) return found;
  const char* image = static_cast<const char*>(mapped);
  const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(image);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(image + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const char* names = image + sections[sections[s].sh_link].sh_offset;
    const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(image + sections[s].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
      const ElfW(Sym) & symbol = symbols[i];
      const bool is_variable = (symbol.st_info & 0xf) == STT_OBJECT && symbol.st_shndx < header->e_shnum &&
                               (sections[symbol.st_shndx].sh_flags & SHF_WRITE);
      if (!is_variable || std::strncmp(names + symbol.st_name, "_ZZN8mac_attn4cuda", 18) != 0) continue;
      found.push_back({reinterpret_cast<char*>(load_address() + symbol.st_value), symbol.st_size});
    }
  }
  munmap(mapped, size);
  return found;
}

const std::vector<Variable>& static_shared() {
  static const std::vector<Variable> variables = find_static_shared();
  return variables;
}

unsigned char nan_byte(size_t i) {
  return static_cast<unsigned char>(kNaN >> i % 4 * 8);
}

void fill(void* p, size_t size) {
  for (size_t i = 0; i < size; ++i) static_cast<volatile unsigned char*>(p)[i] = nan_byte(i);
}

bool is_filled(const void* p, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    if (static_cast<const volatile unsigned char*>(p)[i] != nan_byte(i)) return false;
  }
  return true;
}

}  // namespace

SharedMemory::SharedMemory(size_t dynamic_bytes, bool with_statics)
    : dynamic_bytes_(dynamic_bytes), with_statics_(with_statics) {
  if (posix_memalign(&dynamic_, 128, dynamic_bytes ? dynamic_bytes : 1) != 0) std::abort();
  if (dynamic_bytes == 0) poison(dynamic_, 1);
}

SharedMemory::~SharedMemory() {
  std::free(dynamic_);
}

void SharedMemory::fill_with_nan() {
  fill(dynamic_, dynamic_bytes_);
}

void SharedMemory::close() {
  fill(dynamic_, dynamic_bytes_);
  poison(dynamic_, dynamic_bytes_);
  note_write(dynamic_, dynamic_bytes_);
}

bool SharedMemory::open() {
  unpoison(dynamic_, dynamic_bytes_);
  note_write(dynamic_, dynamic_bytes_);
  return is_filled(dynamic_, dynamic_bytes_);
}

bool SharedMemory::contains(const void* p, size_t bytes) const {
  const auto* begin = static_cast<const char*>(p);
  const auto* dynamic = static_cast<const char*>(dynamic_);
  if (begin >= dynamic && begin + bytes <= dynamic + dynamic_bytes_) return true;
  if (!with_statics_) return false;
  for (const Variable& variable : static_shared()) {
    if (begin >= variable.address && begin + bytes <= variable.address + variable.size) return true;
  }
  return false;
}

void fill_static_shared_with_nan() {
  for (const Variable& variable : static_shared()) fill(variable.address, variable.size);
}

bool static_shared_is_unused() {
  for (const Variable& variable : static_shared()) {
    if (!is_filled(variable.address, variable.size)) return false;
  }
  return true;
}

}  // namespace mac_attn::simt
