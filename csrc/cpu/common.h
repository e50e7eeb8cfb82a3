// What the kernels include, gathered here because it must come before a change of the compile target.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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
