#define LEAPALIGN_ISA avx512bw
#include "vector_avx512.h"

#include "table.h"
