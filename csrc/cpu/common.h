// What the kernels include, gathered here because it must come before a change of the compile target.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#include "../params.h"
#include "../state.h"
#include "kernels.h"
#include "schedule.h"
#include "scratch.h"

#if defined(__x86_64__)
#define MAC_X86 1
#else
#define MAC_X86 0
#endif
#if defined(__aarch64__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MAC_ARM 1
#else
#define MAC_ARM 0
#endif
// Of a level for aarch64: 1, or 2 with dot products of bfloat16. The others leave it.
#define MAC_NEON 0
