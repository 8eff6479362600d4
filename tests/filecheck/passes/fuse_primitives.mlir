// RUN: furiosa-llm opt %s --passes fuse-primitives --split-input-file | filecheck %s

// RMS norm as transformers computes it: in f32, the weight after the cast back. The weight stands
// on either side of the product.
%x, %w = "test.op"() : () -> (tensor<2x8xbf16>, tensor<8xbf16>)
%0 = nn.cast %x : tensor<2x8xbf16> -> tensor<2x8xf32>
%1 = nn.pow %0 to 2.0 : tensor<2x8xf32>
%2 = nn.mean %1 dims [1] keepdim : tensor<2x8xf32> -> tensor<2x1xf32>
%3 = nn.offset %2 by 1.0e-05 : tensor<2x1xf32>
%4 = nn.rsqrt %3 : tensor<2x1xf32>
%5 = nn.mul %0, %4 : tensor<2x8xf32>, tensor<2x1xf32> -> tensor<2x8xf32>
%6 = nn.cast %5 : tensor<2x8xf32> -> tensor<2x8xbf16>
%7 = nn.mul %w, %6 : tensor<8xbf16>, tensor<2x8xbf16> -> tensor<2x8xbf16> loc("norm"("mul_4"))
"test.op"(%7) : (tensor<2x8xbf16>) -> ()
// CHECK:      %x, %w = "test.op"()
// CHECK-NEXT: [[Y:%.*]] = nn.rms_norm %x, %w eps 1.0e-05 : {{.*}} loc("norm"("mul_4"))
// CHECK-NEXT: "test.op"([[Y]])

// -----

// In an f32 model there are no casts.
%x, %w = "test.op"() : () -> (tensor<2x8xf32>, tensor<8xf32>)
%1 = nn.mul %x, %x : tensor<2x8xf32>, tensor<2x8xf32> -> tensor<2x8xf32>
%2 = nn.mean %1 dims [1] keepdim : tensor<2x8xf32> -> tensor<2x1xf32>
%3 = nn.offset %2 by 1.0e-05 : tensor<2x1xf32>
%4 = nn.rsqrt %3 : tensor<2x1xf32>
%5 = nn.mul %4, %x : tensor<2x1xf32>, tensor<2x8xf32> -> tensor<2x8xf32>
%6 = nn.mul %5, %w : tensor<2x8xf32>, tensor<8xf32> -> tensor<2x8xf32>
"test.op"(%6) : (tensor<2x8xf32>) -> ()
// CHECK:      %x, %w = "test.op"()
// CHECK-NEXT: nn.rms_norm %x, %w eps 1.0e-05

// -----

// Not a norm over rows: the mean is over another dim.
%x, %w = "test.op"() : () -> (tensor<8x8xf32>, tensor<8xf32>)
%1 = nn.pow %x to 2.0 : tensor<8x8xf32>
%2 = nn.mean %1 dims [0] keepdim : tensor<8x8xf32> -> tensor<1x8xf32>
%3 = nn.offset %2 by 1.0e-05 : tensor<1x8xf32>
%4 = nn.rsqrt %3 : tensor<1x8xf32>
%5 = nn.mul %x, %4 : tensor<8x8xf32>, tensor<1x8xf32> -> tensor<8x8xf32>
%6 = nn.mul %w, %5 : tensor<8xf32>, tensor<8x8xf32> -> tensor<8x8xf32>
"test.op"(%6) : (tensor<8x8xf32>) -> ()
// CHECK:     %x, %w = "test.op"()
// CHECK-NOT: nn.rms_norm
// CHECK:     "test.op"(%{{.*}})

// -----

// If the weight comes before the cast (OLMo 2), the norm is one of f32 between two casts.
%x, %w = "test.op"() : () -> (tensor<2x8xbf16>, tensor<8xf32>)
%0 = nn.cast %x : tensor<2x8xbf16> -> tensor<2x8xf32>
%1 = nn.pow %0 to 2.0 : tensor<2x8xf32>
%2 = nn.mean %1 dims [1] keepdim : tensor<2x8xf32> -> tensor<2x1xf32>
%3 = nn.offset %2 by 1.0e-05 : tensor<2x1xf32>
%4 = nn.rsqrt %3 : tensor<2x1xf32>
%5 = nn.mul %0, %4 : tensor<2x8xf32>, tensor<2x1xf32> -> tensor<2x8xf32>
%6 = nn.mul %w, %5 : tensor<8xf32>, tensor<2x8xf32> -> tensor<2x8xf32>
%7 = nn.cast %6 : tensor<2x8xf32> -> tensor<2x8xbf16>
"test.op"(%7) : (tensor<2x8xbf16>) -> ()
// CHECK:      [[WIDE:%.*]] = nn.cast %x
// CHECK-NEXT: [[ROWS:%.*]] = nn.rms_norm [[WIDE]], %w eps 1.0e-05 : tensor<2x8xf32>
// CHECK-NEXT: [[Y:%.*]] = nn.cast [[ROWS]]
// CHECK-NEXT: "test.op"([[Y]])

// -----

// RoPE with scaled tables, on q; the tables are shared with k, which is not rotated here.
func.func @forward(%pos: tensor<?x?xi32, #nn.dims<"batch", "seq">>, %x: tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>) -> tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>> {
  %f = nn.constant dense<[1.0, 0.25]> : tensor<2xf32>
  %0 = nn.reshape %pos : tensor<?x?xi32, #nn.dims<"batch", "seq">> -> tensor<?x?x1xi32, #nn.dims<"batch", "seq", _>>
  %1 = nn.cast %0 : tensor<?x?x1xi32, #nn.dims<"batch", "seq", _>> -> tensor<?x?x1xf32, #nn.dims<"batch", "seq", _>>
  %2 = nn.mul %1, %f : tensor<?x?x1xf32, #nn.dims<"batch", "seq", _>>, tensor<2xf32> -> tensor<?x?x2xf32, #nn.dims<"batch", "seq", _>>
  %3 = nn.concat %2, %2 dim 2 : tensor<?x?x2xf32, #nn.dims<"batch", "seq", _>>, tensor<?x?x2xf32, #nn.dims<"batch", "seq", _>> -> tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>>
  %4 = nn.cos %3 : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>>
  %5 = nn.scale %4 by 1.5 : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>>
  %6 = nn.cast %5 : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>> -> tensor<?x?x4xbf16, #nn.dims<"batch", "seq", _>>
  %7 = nn.reshape %6 : tensor<?x?x4xbf16, #nn.dims<"batch", "seq", _>> -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  %8 = nn.sin %3 : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>>
  %9 = nn.scale %8 by 1.5 : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>>
  %10 = nn.cast %9 : tensor<?x?x4xf32, #nn.dims<"batch", "seq", _>> -> tensor<?x?x4xbf16, #nn.dims<"batch", "seq", _>>
  %11 = nn.reshape %10 : tensor<?x?x4xbf16, #nn.dims<"batch", "seq", _>> -> tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  %12 = nn.mul %x, %7 : tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  %13 = nn.slice %x dim 3 from 0 to 2 : tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x2x?x2xbf16, #nn.dims<"batch", _, "seq", _>>
  %14 = nn.slice %x dim 3 from 2 to 4 : tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x2x?x2xbf16, #nn.dims<"batch", _, "seq", _>>
  %15 = nn.neg %14 : tensor<?x2x?x2xbf16, #nn.dims<"batch", _, "seq", _>>
  %16 = nn.concat %15, %13 dim 3 : tensor<?x2x?x2xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x2x?x2xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  %17 = nn.mul %16, %11 : tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x1x?x4xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  %18 = nn.add %12, %17 : tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>, tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>> -> tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
  func.return %18 : tensor<?x2x?x4xbf16, #nn.dims<"batch", _, "seq", _>>
}
// CHECK:      func.func @forward
// CHECK-NEXT:   [[Y:%.*]] = nn.rope %x, %pos scaling 1.5 inv_freq [1.0, 0.25] :
// CHECK-NEXT:   func.return [[Y]]

// -----

// Static sizes, angles as a matmul, no scaling, RoPE on half of each head (Phi-3 mini).
%pos, %x = "test.op"() : () -> (tensor<3x5xi32>, tensor<3x2x5x8xf32>)
%f = nn.constant dense<[[[1.0], [0.25]]]> : tensor<1x2x1xf32>
%0 = nn.reshape %pos : tensor<3x5xi32> -> tensor<3x1x5xi32>
%1 = nn.cast %0 : tensor<3x1x5xi32> -> tensor<3x1x5xf32>
%2 = nn.expand %f : tensor<1x2x1xf32> -> tensor<3x2x1xf32>
%3 = nn.matmul %2, %1 : tensor<3x2x1xf32>, tensor<3x1x5xf32> -> tensor<3x2x5xf32>
%4 = nn.transpose %3 dims 1, 2 : tensor<3x2x5xf32> -> tensor<3x5x2xf32>
%5 = nn.concat %4, %4 dim 2 : tensor<3x5x2xf32>, tensor<3x5x2xf32> -> tensor<3x5x4xf32>
%6 = nn.cos %5 : tensor<3x5x4xf32>
%7 = nn.sin %5 : tensor<3x5x4xf32>
%8 = nn.reshape %6 : tensor<3x5x4xf32> -> tensor<3x1x5x4xf32>
%9 = nn.reshape %7 : tensor<3x5x4xf32> -> tensor<3x1x5x4xf32>
%10 = nn.slice %x dim 3 from 0 to 4 : tensor<3x2x5x8xf32> -> tensor<3x2x5x4xf32>
%11 = nn.slice %x dim 3 from 4 to 8 : tensor<3x2x5x8xf32> -> tensor<3x2x5x4xf32>
%12 = nn.mul %10, %8 : tensor<3x2x5x4xf32>, tensor<3x1x5x4xf32> -> tensor<3x2x5x4xf32>
%13 = nn.slice %10 dim 3 from 0 to 2 : tensor<3x2x5x4xf32> -> tensor<3x2x5x2xf32>
%14 = nn.slice %x dim 3 from 2 to 4 : tensor<3x2x5x8xf32> -> tensor<3x2x5x2xf32>
%15 = nn.neg %14 : tensor<3x2x5x2xf32>
%16 = nn.concat %15, %13 dim 3 : tensor<3x2x5x2xf32>, tensor<3x2x5x2xf32> -> tensor<3x2x5x4xf32>
%17 = nn.mul %16, %9 : tensor<3x2x5x4xf32>, tensor<3x1x5x4xf32> -> tensor<3x2x5x4xf32>
%18 = nn.add %12, %17 : tensor<3x2x5x4xf32>, tensor<3x2x5x4xf32> -> tensor<3x2x5x4xf32>
%19 = nn.concat %18, %11 dim 3 : tensor<3x2x5x4xf32>, tensor<3x2x5x4xf32> -> tensor<3x2x5x8xf32>
"test.op"(%19) : (tensor<3x2x5x8xf32>) -> ()
// CHECK:      %pos, %x = "test.op"()
// CHECK-NEXT: [[Y:%.*]] = nn.rope %x, %pos scaling 1.0 inv_freq [1.0, 0.25] : tensor<3x2x5x8xf32>
// CHECK-NEXT: "test.op"([[Y]])

// -----

// Neighbours are paired instead of halves: the first half must be the negated second one.
%pos, %x = "test.op"() : () -> (tensor<3x5xi32>, tensor<3x2x5x2xf32>)
%f = nn.constant dense<[1.0]> : tensor<1xf32>
%0 = nn.reshape %pos : tensor<3x5xi32> -> tensor<3x5x1xi32>
%1 = nn.cast %0 : tensor<3x5x1xi32> -> tensor<3x5x1xf32>
%2 = nn.mul %1, %f : tensor<3x5x1xf32>, tensor<1xf32> -> tensor<3x5x1xf32>
%3 = nn.concat %2, %2 dim 2 : tensor<3x5x1xf32>, tensor<3x5x1xf32> -> tensor<3x5x2xf32>
%4 = nn.cos %3 : tensor<3x5x2xf32>
%5 = nn.sin %3 : tensor<3x5x2xf32>
%6 = nn.reshape %4 : tensor<3x5x2xf32> -> tensor<3x1x5x2xf32>
%7 = nn.reshape %5 : tensor<3x5x2xf32> -> tensor<3x1x5x2xf32>
%8 = nn.mul %x, %6 : tensor<3x2x5x2xf32>, tensor<3x1x5x2xf32> -> tensor<3x2x5x2xf32>
%9 = nn.slice %x dim 3 from 0 to 1 : tensor<3x2x5x2xf32> -> tensor<3x2x5x1xf32>
%10 = nn.slice %x dim 3 from 1 to 2 : tensor<3x2x5x2xf32> -> tensor<3x2x5x1xf32>
%11 = nn.neg %9 : tensor<3x2x5x1xf32>
%12 = nn.concat %11, %10 dim 3 : tensor<3x2x5x1xf32>, tensor<3x2x5x1xf32> -> tensor<3x2x5x2xf32>
%13 = nn.mul %12, %7 : tensor<3x2x5x2xf32>, tensor<3x1x5x2xf32> -> tensor<3x2x5x2xf32>
%14 = nn.add %8, %13 : tensor<3x2x5x2xf32>, tensor<3x2x5x2xf32> -> tensor<3x2x5x2xf32>
"test.op"(%14) : (tensor<3x2x5x2xf32>) -> ()
// CHECK:     %pos, %x = "test.op"()
// CHECK-NOT: nn.rope
// CHECK:     "test.op"(%{{.*}})
