// The kernels of one ISA level, gathered.
#include "../launch.h"
#include "simd.h"

#define RIDGELINE_TEXT(x) #x
#define RIDGELINE_NAME(x) RIDGELINE_TEXT(x)

RIDGELINE_BEGIN

void embed(const EmbedLaunch&, const StepView&, Worker&);
void norm(const NormLaunch&, const StepView&, Worker&);
void quantise(const QuantiseLaunch&, const StepView&, Worker&);
void add(const AddLaunch&, const StepView&, Worker&);
void activate(const ActivateLaunch&, const StepView&, Worker&);
void linear(const LinearLaunch&, const StepView&, Worker&);
void route(const RouteLaunch&, const StepView&, Worker&);
void experts(const ExpertLaunch&, const StepView&, Worker&);
void combine(const CombineLaunch&, const StepView&, Worker&);
void softcap(const SoftcapLaunch&, const StepView&, Worker&);
void rope_store(const RopeStoreLaunch&, const StepView&, Worker&);
void attention(const AttentionLaunch&, const StepView&, Worker&);
size_t linear_scratch_bytes(const LinearLaunch&);
size_t attention_scratch_bytes(const AttentionLaunch&);
size_t expert_scratch_bytes(const ExpertLaunch&);
size_t route_partial_bytes(const RouteLaunch&);
void unpack_row(const MatrixView&, int64_t, float*);
void quantise_rows(const float*, int64_t, int32_t, uint8_t*);
void draw_rows(float*, int64_t, int32_t, const RowDraw*, int32_t*, Worker&);
double peak_ops(PeakFormat, int64_t);
double peak_ratio(PeakFormat, PeakFormat);
int32_t read_lines(const uint8_t*, size_t);

extern const Kernels kernels;
const Kernels kernels = {RIDGELINE_NAME(RIDGELINE_ISA),
                         kMaxTokens,
                         embed,
                         norm,
                         quantise,
                         add,
                         activate,
                         linear,
                         route,
                         experts,
                         combine,
                         softcap,
                         rope_store,
                         attention,
                         linear_scratch_bytes,
                         attention_scratch_bytes,
                         expert_scratch_bytes,
                         route_partial_bytes,
                         unpack_row,
                         quantise_rows,
                         draw_rows,
                         peak_ops,
                         peak_ratio,
                         read_lines};

RIDGELINE_END
